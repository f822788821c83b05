"""Can two blocks be timed instead of the trunk? Compiling the trunk at forty token counts can take hours on a Jetson.

Blocks of one shape run the same kernels, so the latency of the trunk is a linear function of that of two of its
blocks; what is outside the blocks (a launch, the first load) makes the constant. The function is fitted at three
token counts and checked at two others. As a function of latency alone it keeps the steps where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgeprune.io import load, save
from edgeprune.latency.timing import UNLIMITED, Room, interleave
from edgeprune.records import DepthCheck, Vit
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.target import Target

log = logging.getLogger(__name__)

PAIR_BLOCKS = 2
PAIR = "pair.onnx"  # two blocks with a symbolic token axis
LEAST_BLOCKS = 4  # of a trunk for which two blocks save anything
MOST_OFF = 0.03  # relative error at the checked counts beyond which the trunk is compiled
FITTED, CHECKED = (0.0, 0.5, 1.0), (0.25, 0.75)  # where in the range of counts


def depth_check(
    target: Target,
    vit: Vit,
    counts: Sequence[int],
    rounds: int,
    trunk: Callable[[int], Open],
    pair: Callable[[int], Open],
    room: Room = UNLIMITED,
) -> DepthCheck | None:
    """The latency of the trunk from that of two blocks; None, with a warning, where it is not linear enough.

    `counts` are the token counts that can be measured, ascending. `trunk(n)` and `pair(n)` compile the trunk and two
    of its blocks at n tokens. The measurement is kept in the work folder. Raises EngineError, OutputError.
    """

    def make(path: Path) -> None:
        save(measured(target, counts, rounds, trunk, pair, room), path)

    check = load(target.work.step("depth", ".json", (vit, target.setup, counts, rounds), make), DepthCheck)
    if check.off > MOST_OFF:
        log.warning(
            "two blocks predict the trunk only within %.1f %%: compiling all %d blocks at every token count",
            100 * check.off, vit.depth,
        )  # fmt: skip
        return None
    log.info("two of %d blocks are timed: they predict the trunk within %.1f %%", vit.depth, 100 * check.off)
    return check


def measured(
    target: Target,
    counts: Sequence[int],
    rounds: int,
    trunk: Callable[[int], Open],
    pair: Callable[[int], Open],
    room: Room = UNLIMITED,
) -> DepthCheck:
    """Time trunk and pair in the same rounds at five token counts: three are fitted, two check the function."""

    fitted, checked = counts_at(counts, FITTED), counts_at(counts, CHECKED)
    openers = {(name, n): opens(n) for n in fitted + checked for name, opens in (("trunk", trunk), ("pair", pair))}
    what = "timing the trunk and two blocks, round"
    samples = interleave(openers, rounds, progress=target.progress, room=room, what=what)
    whole, part = ({n: float(np.median(samples[name, n])) for n in fitted + checked} for name in ("trunk", "pair"))
    return fit(whole, part, fitted, checked)


def counts_at(counts: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The counts at these shares of their range."""
    return [counts[round(share * (len(counts) - 1))] for share in shares]


def fit(
    whole: Mapping[int, float], part: Mapping[int, float], fitted: Sequence[int], checked: Sequence[int]
) -> DepthCheck:
    """The linear function from the latency of two blocks to that of the trunk (ms by token count)."""
    slope, offset_ms = np.polyfit([part[n] for n in fitted], [whole[n] for n in fitted], 1)
    if slope <= 0:  # latencies that do not rise with the tokens
        return DepthCheck(slope=1.0, offset_ms=0.0, off=1.0)
    off = max(abs((slope * part[n] + offset_ms) / whole[n] - 1) for n in checked)
    return DepthCheck(slope=float(slope), offset_ms=float(offset_ms), off=float(off))
