"""Two blocks instead of the whole trunk: the ratio, its check, and what happens where blocks do not add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.records import NOISELESS

from edgeprune.devices import load_device
from edgeprune.latency.depth import depth_check
from edgeprune.latency.probing import probe
from edgeprune.latency.staircase import DENSE, FIXED, treads
from edgeprune.records import DepthCheck, Vit
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.steps import WorkFolder
from edgeprune.runtimes.target import Target

COUNTS = list(range(20, 198))


class Constant:
    """A session of constant latency, ms."""

    def __init__(self, ms: float, opened: list[float]) -> None:
        self.ms, self.opened = ms, opened

    def time_ms(self) -> float:
        return self.ms

    def __enter__(self) -> Constant:
        self.opened.append(self.ms)
        return self

    def __exit__(self, *error: object) -> None:
        pass


def block_ms(tokens: int) -> float:
    """A staircase: 0.1 ms for each 32 tokens."""
    return 0.1 * -(-tokens // 32)


def trunk_ms(tokens: int) -> float:
    """12 blocks, and a launch."""
    return 0.02 + 12 * block_ms(tokens)


def pair_ms(tokens: int) -> float:
    """Two blocks, and a launch."""
    return 0.02 + 2 * block_ms(tokens)


def opener(ms: Callable[[int], float], opened: list[float] | None = None) -> Callable[[int], Open]:
    return lambda n: lambda: Constant(ms(n), [] if opened is None else opened)  # type: ignore[return-value]


@pytest.fixture
def target(tmp_path: Path) -> Target:
    runtime: Any = SimpleNamespace(suffix=".engine")
    return Target(load_device("cpu"), runtime, NOISELESS, WorkFolder(tmp_path))


def test_blocks_that_add_up(target: Target, make_vit: Callable[..., Vit]) -> None:
    """Two blocks predict the trunk at every count; the trunk is opened at five of them."""
    trunks: list[float] = []
    check = depth_check(target, make_vit(), COUNTS, 3, opener(trunk_ms, trunks), opener(pair_ms))
    assert check is not None and check.off < 1e-9 and len(trunks) == 5
    for n in COUNTS:
        assert check.trunk_ms(pair_ms(n)) == pytest.approx(trunk_ms(n))
    assert depth_check(target, make_vit(), COUNTS, 3, opener(trunk_ms, trunks), opener(pair_ms)) == check
    assert len(trunks) == 5, "the check is kept"


def test_blocks_that_do_not_add_up(
    target: Target, make_vit: Callable[..., Vit], caplog: pytest.LogCaptureFixture
) -> None:
    """A trunk that leaves the cache at some count takes longer than its blocks: all of it is measured."""
    whole = opener(lambda n: 12 * block_ms(n) * (1.3 if 100 < n < 180 else 1.0))
    assert depth_check(target, make_vit(), COUNTS, 3, whole, opener(lambda n: 2 * block_ms(n))) is None
    assert "compiling all 12 blocks at every token count" in caplog.text


def test_latencies_that_do_not_rise(target: Target, make_vit: Callable[..., Vit]) -> None:
    assert depth_check(target, make_vit(), COUNTS, 3, opener(lambda n: 1 - n / 1000), opener(pair_ms)) is None


def test_the_same_treads_from_two_blocks(target: Target, make_vit: Callable[..., Vit]) -> None:
    """Probing two blocks finds the treads of the trunk, with its latencies."""
    vit = make_vit()
    check = depth_check(target, vit, COUNTS, 1, opener(trunk_ms), opener(pair_ms))
    assert check is not None
    others = {FIXED: opener(lambda _: 0.1)(1), DENSE: opener(lambda n: 0.1 + trunk_ms(n))(197)}
    whole, _ = probe(vit, NOISELESS, opener(trunk_ms), others, 1, exhaustive=True)
    pairs, raw = probe(vit, NOISELESS, opener(pair_ms), others, 1, exhaustive=True, trunk_ms=check.trunk_ms)
    assert treads(pairs) == treads(whole) and len(treads(whole)) > 4
    for a, b in zip(whole.points, pairs.points, strict=True):
        assert b.latency.median_ms == pytest.approx(a.latency.median_ms)
    assert max(ms for key, found in raw.items() if key.kind == "trunk" for ms in found) == pair_ms(197)


@pytest.mark.parametrize("wrong", [{"slope": 0.0}, {"off": -1.0}])
def test_a_check_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="depth check"):
        DepthCheck(**{"slope": 6.0, "offset_ms": -0.1, "off": 0.0} | wrong)
