"""Interleaved timing: the order of measurements, the interval of a speed-up, and fidelity checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeprune.latency.timing import AT_ONCE, WARMUP, WINDOW, Room, interleave, warm_up
from edgeprune.records import Preprocessing
from edgeprune.runtimes.inference import logits_of
from edgeprune.stats import log_softmax, ratio
from edgeprune.tasks import CLASSIFY

Samples = dict[str, list[float]]
HOW = Preprocessing(
    image_px=2, resize_px=2, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
)


class Clock:
    """Sessions that note who was timed, in order, and answer with the number of the call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.requests: list[int] = []
        self.open_now: set[str] = set()
        self.most_open = 0

    def session(self, name: str) -> Callable[[], Fake]:
        return lambda: Fake(self, name)


class Fake:
    """One candidate."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def time_ms(self) -> float:
        assert self.name in self.clock.open_now
        self.clock.calls.append(self.name)
        return float(len(self.clock.calls))

    def infer(self, images: np.ndarray) -> np.ndarray:
        raise AssertionError("latency needs no inference on images")

    def __enter__(self) -> Fake:
        self.clock.open_now.add(self.name)
        self.clock.most_open = max(self.clock.most_open, len(self.clock.open_now))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clock.open_now.remove(self.name)


NAMES = ("a", "b", "c", "d")


def measured(rounds: int, samples: Samples | None = None, **options: object) -> tuple[Clock, Samples]:
    """Four candidates, interleaved, without the warm-up of clocks."""
    clock = Clock()
    options = {"warmup_ms": 0.0} | options
    found = interleave({n: clock.session(n) for n in NAMES}, rounds, samples, **options)  # type: ignore[arg-type]
    return clock, found


def rounds_of(clock: Clock) -> list[list[str]]:
    """Order of the timed candidates by round, after the warm-up."""
    timed = clock.calls[WARMUP * len(NAMES) :]
    return [timed[i : i + len(NAMES)] for i in range(0, len(timed), len(NAMES))]


def test_every_candidate_once_in_every_round_in_changing_order() -> None:
    clock, samples = measured(12)
    orders = rounds_of(clock)
    assert len(orders) == 12
    assert all(sorted(order) == list(NAMES) for order in orders)
    assert len({tuple(order) for order in orders}) > 4
    assert all(len({order.index(name) for order in orders}) > 2 for name in NAMES), "nobody has a fixed place"
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys(NAMES, 12)
    assert not clock.open_now


def test_samples_are_the_timed_inferences() -> None:
    clock, samples = measured(6)
    for name, values in samples.items():
        assert [clock.calls[int(v) - 1] for v in values] == [name] * 6
        assert values == sorted(values)


def test_order_is_repeatable() -> None:
    assert measured(5)[0].calls == measured(5)[0].calls


def test_warm_up_comes_before_the_first_round() -> None:
    clock, _ = measured(1)
    assert clock.calls[: WARMUP * len(NAMES)] == [name for name in NAMES for _ in range(WARMUP)]


def test_interrupted_measurement_goes_on() -> None:
    """What was measured before the interruption is neither timed again nor changed."""
    saved: list[Samples] = []

    class Stop(Exception):
        pass

    def after_round(samples: Samples) -> None:
        saved.append({name: list(values) for name, values in samples.items()})
        if len(saved) == 3:
            raise Stop

    clock = Clock()
    candidates = {n: clock.session(n) for n in NAMES}
    with pytest.raises(Stop):
        interleave(candidates, 8, {}, after_round, warmup_ms=0.0)
    assert not clock.open_now, "sessions are closed on the way out"
    before = saved[-1]
    assert all(len(values) == 3 for values in before.values())
    clock, samples = measured(8, {name: list(values) for name, values in before.items()})
    assert len(rounds_of(clock)) == 5
    for name in NAMES:
        assert samples[name][:3] == before[name]
        assert len(samples[name]) == 8
    whole, _ = measured(8)
    assert rounds_of(clock) == rounds_of(whole)[3:]


def test_finished_candidates_are_not_even_opened() -> None:
    samples: Samples = {"a": [1.0] * 4, "b": [1.0] * 4}
    clock, found = measured(4, samples)
    assert set(clock.calls) == {"c", "d"}
    assert found["a"] == [1.0] * 4 and len(found["c"]) == 4
    clock, _ = measured(4, found)
    assert clock.calls == [] and clock.most_open == 0


def test_candidates_that_lag_behind_catch_up() -> None:
    clock, found = measured(4, {"a": [1.0] * 3})
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(NAMES, 4)
    assert found["a"][:3] == [1.0] * 3
    assert clock.calls.count("a") == WARMUP + 1


def test_one_open_session_at_a_time_where_memory_is_short() -> None:
    clock, samples = measured(3, room=Room(total=100, guess=101))
    assert clock.most_open == 1 and not clock.open_now
    assert all(len(values) == 3 for values in samples.values())
    assert measured(3)[0].most_open == len(NAMES)
    for name, values in samples.items():
        assert [clock.calls[int(v) - 1] for v in values] == [name] * 3


class OnGpu(Fake):
    """A candidate that knows what it takes."""

    def memory_bytes(self) -> int:
        return 40


def test_as_many_sessions_stay_open_as_say_that_they_fit() -> None:
    """Two of 40 bytes in 100, with one more open for each of its timings; the guess does not count for them."""
    clock = Clock()
    candidates = {n: partial(OnGpu, clock, n) for n in NAMES}
    samples = interleave(candidates, 3, room=Room(total=100, guess=10**9), warmup_ms=0.0)
    assert clock.most_open == 3 and not clock.open_now
    for name, values in samples.items():
        assert [clock.calls[int(v) - 1] for v in values] == [name] * 3


class Graphed(Fake):
    """A candidate on a GPU; those called "plain…" have no CUDA graph."""

    @property
    def cuda_graph(self) -> bool:
        return not self.name.startswith("plain")


def test_engines_with_and_without_a_cuda_graph_are_not_compared_silently(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    for names, warned in ((("plain a", "plain b"), False), (("a", "b"), False), (("a", "plain b"), True)):
        graphs: dict[str, bool | None] = {}
        interleave({n: partial(Graphed, clock, n) for n in names}, 1, warmup_ms=0, graphs=graphs)
        assert graphs == {n: not n.startswith("plain") for n in names}
        assert ("1 of 2 engines run without a CUDA graph" in caplog.text) is warned


def test_clocks_get_time_to_rise() -> None:
    """Candidates run in turn until so many milliseconds have been run, both inferences of a timing counted."""
    clock, samples = measured(1, warmup_ms=1000.0)
    before = clock.calls[: min(int(values[0]) for values in samples.values()) - 1]
    assert 2 * sum(range(1, len(before) + 1)) >= 1000 > 2 * sum(range(1, len(before) - len(NAMES) + 1))
    assert before[-4:] == list(NAMES)


class Far(Fake):
    """A candidate on another machine."""

    def times_ms(self, order: Sequence[Any]) -> list[float]:
        self.clock.requests.append(len(order))
        return [session.time_ms() for session in order]


def test_rounds_on_another_machine_share_a_request() -> None:
    """Nothing runs there between two requests, and clocks fall; the order of timings is that of single rounds."""
    clock = Clock()
    samples = interleave({n: partial(Far, clock, n) for n in NAMES}, 20, warmup_ms=0.0)
    here, expected = measured(20)
    assert samples == expected and clock.calls == here.calls
    assert clock.requests == [WARMUP * len(NAMES), AT_ONCE, 4 * 20 - AT_ONCE], "all warm up together"


def test_progress_reaches_its_end() -> None:
    seen: list[tuple[str, int, int]] = []
    measured(3, progress=lambda what, done, total: seen.append((what, done, total)), what="timing, round")
    loading = [("loading engines", i, len(NAMES)) for i in range(len(NAMES))]
    assert seen == [*loading, *[("timing, round", i, 3) for i in range(4)]]


# --- the speed-up and its interval ---


def test_ratio_is_the_median_of_rounds() -> None:
    dense, pruned = [4.0, 40.0, 8.0, 9.0, 10.0], [2.0, 10.0, 4.0, 3.0, 5.0]  # ratios 2, 4, 2, 3, 2
    value, (low, high) = ratio(dense, pruned)
    assert value == 2
    assert (low, high) == (2, 4)


def test_ratio_does_not_see_drift_that_hits_both() -> None:
    drift = [1.0, 1.5, 2.0, 4.0, 8.0, 3.0, 1.0, 0.5, 6.0]
    value, interval = ratio([3 * d for d in drift], [2 * d for d in drift])
    assert value == pytest.approx(1.5)
    assert interval == pytest.approx((1.5, 1.5))


def test_ratio_needs_equally_many() -> None:
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_interval_of_the_ratio_covers_the_truth() -> None:
    """Of 300 intervals over 40 noisy rounds some 95 % hold the true ratio, and they are not trivially wide."""
    rng = np.random.default_rng(0)
    inside, widths = 0, []
    for _ in range(300):
        drift = np.exp(0.3 * rng.standard_normal(40))
        dense = 1.3 * drift * np.exp(0.1 * rng.standard_normal(40))
        pruned = drift * np.exp(0.1 * rng.standard_normal(40))
        _, (low, high) = ratio(list(dense), list(pruned))
        inside += low <= 1.3 <= high
        widths.append(high - low)
    assert 0.92 <= inside / 300 <= 0.99
    assert np.median(widths) < 0.25


# --- fidelity ---

DENSE = np.array([[math.log(0.5), math.log(0.3), math.log(0.2)], [0.0, 0.0, 0.0]], np.float32)
PRUNED = np.array([[math.log(0.4), math.log(0.4), math.log(0.2)], [0.0, 0.0, 0.0]], np.float32)


def kl(dense: NDArray[np.float32], pruned: NDArray[np.float32]) -> float | None:
    return CLASSIFY.fidelity(dense, pruned, None).kl


def test_kl_by_hand() -> None:
    first = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    assert kl(DENSE, PRUNED) == pytest.approx(first / 2, abs=1e-7)
    back = 0.4 * math.log(0.4 / 0.5) + 0.4 * math.log(0.4 / 0.3)
    assert kl(PRUNED, DENSE) == pytest.approx(back / 2, abs=1e-7)
    assert kl(DENSE, DENSE) == 0


def test_kl_is_of_distributions_not_of_logits() -> None:
    shift = np.array([[5.0], [-300.0]], np.float32)
    assert kl(DENSE + shift, PRUNED) == pytest.approx(kl(DENSE, PRUNED), abs=1e-5)


def test_log_softmax_survives_huge_logits() -> None:
    rows = np.array([[1e4, 0.0], [-1e4, -1e4]], np.float32)
    np.testing.assert_allclose(log_softmax(rows), [[0, -1e4], [-math.log(2), -math.log(2)]])


def test_agreement_by_hand() -> None:
    dense = np.array([[3, 1], [0, 2], [5, 4], [1, 2]], np.float32)
    pruned = np.array([[9, 8], [1, 0], [0, 7], [0, 1]], np.float32)  # the second and third disagree
    assert CLASSIFY.fidelity(dense, pruned, None).agreement == 50
    assert CLASSIFY.fidelity(dense, dense, None).agreement == 100


def test_top1_by_hand() -> None:
    logits = np.array([[3, 1, 0], [0, 2, 1], [5, 4, 9], [1, 2, 0]], np.float32)  # 0, 1, 2, 1
    assert CLASSIFY.fidelity(None, logits, [0, 1, 2, 2]).top1 == 75
    assert CLASSIFY.fidelity(None, logits, [1, 0, 0, 0]).top1 == 0


class Summing:
    """A session whose outputs tell which pictures it saw: the sum, and the size of the batch."""

    def __init__(self, batch: int) -> None:
        self.shape = (batch, 3, 2, 2)

    def time_ms(self) -> float:
        raise AssertionError("fidelity needs no clock")

    def infer(self, images: np.ndarray) -> np.ndarray:
        assert images.shape == self.shape
        return np.stack([images.sum((1, 2, 3)), np.full(len(images), len(images))], axis=1).astype(np.float32)

    def __enter__(self) -> Summing:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_logits_of_all_pictures_in_order(batch: int) -> None:
    """Five pictures: batches that do not divide them are filled up, and the filling is thrown away."""
    pixels = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    wanted = ((pixels.astype(np.float64) / 255 - 0.5) / 0.5).sum((1, 2, 3))
    seen: list[int] = []
    rows = logits_of(Summing(batch), pixels, HOW, batch, lambda what, done, total: seen.append(done))
    assert rows.shape == (5, 2)
    np.testing.assert_allclose(rows[:, 0], wanted, rtol=1e-5)
    assert set(rows[:, 1]) == {batch}
    assert all(done <= 5 for done in seen)


class Cooling:
    """Latencies that fall to 1 ms."""

    def __init__(self, decay: float) -> None:
        self.calls, self.decay = 0, decay

    def time_ms(self) -> float:
        self.calls += 1
        return 1 + math.exp(-self.calls / self.decay) if self.decay else float(self.calls)


def test_warm_up_lasts_until_latencies_are_stable() -> None:
    fast, slow = Cooling(5), Cooling(50)
    assert warm_up(fast, 0) and warm_up(slow, 0)  # type: ignore[arg-type]
    assert 2 * WINDOW <= fast.calls < slow.calls < 1000
    steady = Cooling(0.01)
    assert warm_up(steady, 300)  # type: ignore[arg-type]
    assert steady.calls == 150, "clocks can be steady before they rise"


def test_warm_up_is_bounded() -> None:
    never = Cooling(0)
    assert not warm_up(never, most_s=0.0)  # type: ignore[arg-type]
    assert never.calls == WINDOW
