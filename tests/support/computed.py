"""A pipeline without engines or a model: latency and fidelity are functions of the token counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgeprune.devices import load_device
from edgeprune.latency.probing import probe, unconfirmed
from edgeprune.latency.staircase import DENSE, FIXED, Samples
from edgeprune.pipeline.context import Context, Options
from edgeprune.pipeline.measure import Measured, MeasuredSchedule, predicted_ms
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.records import ClassFidelity, Latency, Preprocessing, Schedule, Staircase, Vit
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.steps import WorkFolder
from edgeprune.runtimes.target import Target
from edgeprune.scheduling.search import Tokens
from support.records import NOISELESS

HOW = Preprocessing(
    image_px=32, resize_px=32, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
)
FIXED_MS = 1.0
SPREAD = (0.99, 1.0, 1.0, 1.0, 1.01)  # of the timings of one engine
EDGES = (50, 85, 121, 157)  # right ends of the treads of `stairs`; probing finds three of them by itself


def stairs(tokens: int) -> float:
    """Latency of a trunk, ms: four steps; a block that moves to the next tread changes 1 % of the whole model."""
    return 4 + 1.5 * sum(tokens > end for end in EDGES)


def context_of(vit: Vit, work: Path, runtime: Any = None, recovery: Any = None, **options: Any) -> Context:
    """A context of a model that is its shape alone, without pictures; the runtime is needed where engines are."""
    model: Any = SimpleNamespace(vit=vit, preprocessing=HOW, task="classify")
    target = Target(load_device("cpu"), runtime, NOISELESS, WorkFolder(work))
    return Context(Options(work=work, **options), target, model, None, recovery=recovery)


def kl_of(tokens: Tokens, whole: int) -> float:
    """Rises with the share of tokens lost, most in the first blocks; a cut costs more than it does alone."""
    before, total = whole, 0.0
    for block, count in enumerate(tokens):
        total += 4 * ((before - count) / before) ** 2 / (1 + block)
        before = count
    return total


class ComputedEvaluator:
    """What ScheduleScores asks for fidelity; counts how often, and can be interrupted."""

    def __init__(self, whole: int) -> None:
        self.whole, self.asked = whole, list[Tokens]()
        self.stop_after: int | None = None

    def base(self, tokens: Tokens) -> None:
        """Nothing is kept between schedules."""

    def fidelity(self, tokens: Tokens) -> ClassFidelity:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(tokens)
        kl = kl_of(tokens, self.whole)
        return ClassFidelity(kl=kl, agreement=max(100 - 40 * kl, 0.0))

    def fidelity_of_random(self, tokens: int) -> ClassFidelity:
        return ClassFidelity(kl=0.0, agreement=100 * (tokens / self.whole) ** 0.25)


class ComputedScores(ScheduleScores):
    """Scores that are kept as those of a model are, of made-up fidelity."""

    @cached_property
    def evaluator(self) -> Any:
        return ComputedEvaluator(self.context.model.vit.tokens)


class Machine:
    """A device whose trunk takes `curve(tokens)` ms; engines take `factor(tokens)` times the true staircase's sum.

    Stands for what `refine` and `compare` measure with, and records it.
    """

    def __init__(
        self, vit: Vit, factor: Callable[[Tokens], float] = lambda _: 1.0, curve: Callable[[int], float] = stairs
    ) -> None:
        self.vit, self.curve, self.factor = vit, curve, factor
        self.samples: Samples = {}
        self.sessions: list[list[Tokens]] = []  # schedules that were built and timed in the same rounds
        self.on: list[Staircase] = []  # the staircase that each session was given
        self.truth = self.probed({}, exhaustive=True)

    def probed(self, samples: Samples, exhaustive: bool = False, used: Collection[int] = ()) -> Staircase:
        def opens(ms: float) -> Open:
            session: Any = SimpleNamespace(time_ms=lambda: ms)
            return lambda: nullcontext(session)  # type: ignore[return-value]

        others = {FIXED: opens(FIXED_MS), DENSE: opens(FIXED_MS + self.curve(self.vit.tokens))}
        trunk: Callable[[int], Open] = lambda n: opens(self.curve(n))  # noqa: E731
        return probe(self.vit, NOISELESS, trunk, others, 1, exhaustive, samples, used=used)[0]

    def staircase(self) -> Staircase:
        """As `profile` measures it."""
        return self.probed(self.samples)

    def confirmed(
        self, context: Context, staircase: Staircase, methods: Sequence[str], tokens: Iterable[int]
    ) -> Staircase:
        """In the place of pipeline.profile.confirmed."""
        missing = unconfirmed(staircase, tokens)
        return self.probed(self.samples, used=missing) if missing else staircase

    def measured_schedules(
        self, context: Context, staircase: Staircase, schedules: Sequence[Schedule], session: str = ""
    ) -> list[MeasuredSchedule]:
        """In the place of pipeline.measure.measured_schedules."""
        self.sessions.append([s.tokens for s in schedules])
        self.on.append(staircase)
        return [MeasuredSchedule(s, predicted_ms(staircase, s, m), m) for s in schedules for m in [self.measured(s)]]

    def measured(self, schedule: Schedule) -> Measured:
        """The engine of a schedule, timed next to that of the unpruned model."""
        dense = self.truth.dense
        unscaled = Measured(dense, dense, 1.0, (1.0, 1.0))
        ms = predicted_ms(self.truth, schedule, unscaled) * self.factor(schedule.tokens)
        ratio = dense.median_ms / ms
        latency = Latency(samples_ms=tuple(ms * part for part in SPREAD))
        return Measured(latency, dense, ratio, (ratio * SPREAD[0], ratio * SPREAD[-1]))
