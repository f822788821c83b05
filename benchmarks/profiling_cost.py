"""What adaptive probing costs and loses against probing every count: simulated devices, recordings, injected noise.

python benchmarks/profiling_cost.py [--runs 100]
Needs no hardware. Latencies are those of the tail-effect model or of the recordings in tests/golden; the schedule is
the paper's for measured accuracy curves, its edges probed afterwards as `build` does. Prints Markdown tables and one
JSON line last. About ten minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
import numpy as np

from edgeprune import devices
from edgeprune.io import load
from edgeprune.latency.probing import FEW, all_counts, confirmed_edges, on_edges, probe
from edgeprune.latency.staircase import DENSE, FIXED, SampleKey, treads
from edgeprune.latency.timing import WARMUP
from edgeprune.records import Setup, Staircase, Vit
from edgeprune.runtimes import RUNS_PER_TIMING
from edgeprune.runtimes.inference import Open
from edgeprune.runtimes.kernel_times import latency_ms
from edgeprune.runtimes.simulated import operations_of_trunk
from edgeprune.scheduling.goals import Goal
from edgeprune.scheduling.paper import paper_schedule

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
ROUNDS = 3 * FEW
ALPHAS = (0.3, 0.5, 0.7)
PRECISIONS, BATCHES = ("fp32", "fp16"), (1, 2, 4, 8, 16)
NOISES = ("jitter", "drift", "outliers", "throttling")

Accuracy = Callable[[int], float]


def curve(t: float, s: float) -> Accuracy:
    """A(n) / A_max = 1 - exp(-(n / t)^s), fitted to what `Evaluator.fidelity_of_random` measured (percent)."""
    return lambda n: float(-np.expm1(-((n / t) ** s)))


ACCURACIES = {
    # ViT-Tiny, 96 ImageNet pictures: 20: 6, 32: 10, 48: 23, 64: 44, 96: 72, 128: 78, 160: 78, 197: 79
    "vit_tiny": curve(72, 2.5),
    # vit_digits: 20: 67, 28: 78, 36: 83, 48: 94, 64: 96, 96: 98, 128: 99, 197: 99
    "vit_digits": curve(18, 1.0),
}


def shape(name: str, width: int) -> Vit:
    """A ViT of 224 px and patch 16 with heads of 64."""
    return Vit(
        name=name, weights_sha256="0" * 64, family="vit", image_px=224, patch_px=16, depth=12, width=width,
        heads=width // 64, head_dim=64, mlp_width=4 * width, prefix=1, tokens=197, classes=1000, prefix_pooled=True,
    )  # fmt: skip


SHAPES = (shape("vit_tiny", 192), shape("deit_small", 384))


class Machine:
    """Hands out candidates that take given times, under a noise that goes on with each inference."""

    def __init__(self, noise: str | None = None, seed: int = 0) -> None:
        self.noise, self.rng = noise, np.random.default_rng(seed)
        self.inferences, self.spent_ms = 0, 0.0

    def opener(self, samples_ms: Sequence[float]) -> Open:
        """A candidate whose times are drawn from these samples."""
        return lambda: KnownSession(self, samples_ms)

    def disturbed(self, ms: float) -> float:
        """A time under the noise: 5 % jitter, and beside it what its name says."""
        self.inferences += 1
        run = self.inferences / 2500  # about the inferences of one staircase
        if self.noise in NOISES:
            ms *= max(1 + 0.05 * self.rng.standard_normal(), 0.1)
        if self.noise == "drift":
            ms *= 1 + 0.1 * np.sin(3 * np.pi * run) + 0.1 * run
        if self.noise == "outliers" and self.rng.random() < 0.05:
            ms *= self.rng.uniform(1.5, 5)
        if self.noise == "throttling":  # half as slow again, in the middle of the probing
            ms *= 1 + 0.5 * min(max((run - 0.15) / 0.5, 0), 1)
        self.spent_ms += RUNS_PER_TIMING * ms
        return float(ms)


class KnownSession:
    """What `interleave` opens and times."""

    def __init__(self, machine: Machine, samples_ms: Sequence[float]) -> None:
        self.machine, self.samples_ms = machine, samples_ms

    def time_ms(self) -> float:
        """One of the known samples, under the machine's noise, ms."""
        known = self.samples_ms
        return self.machine.disturbed(known[0] if len(known) == 1 else float(self.machine.rng.choice(known)))

    def infer(self, images: object) -> None:
        """Raises AssertionError."""
        raise AssertionError("probing infers nothing")

    def __enter__(self) -> KnownSession:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Source(NamedTuple):
    """A staircase that is known whole: samples (ms) of the trunk by token count, of FIXED and of DENSE."""

    vit: Vit
    setup: Setup
    trunk: Mapping[int, Sequence[float]]
    others: Mapping[SampleKey, Sequence[float]]
    recorded: Staircase | None = None

    def utility(self, alpha: float, accuracy: Accuracy, tokens: int) -> float:
        """The paper's, with the true latencies."""
        ms, most = median(self.trunk[tokens]), median(self.trunk[self.vit.tokens])
        return alpha * (1 - ms / most) + (1 - alpha) * accuracy(tokens) / accuracy(self.vit.tokens)

    def setup_on(self, machine: Machine) -> Setup:
        """The setup; under a noise simulated latencies are no longer noiseless and are probed like measured ones."""
        if machine.noise is None or not self.setup.noiseless:
            return self.setup
        return msgspec.structs.replace(self.setup, runtime="disturbed", noiseless=False)

    def best(self, alpha: float, accuracy: Accuracy) -> int:
        """What probing every count chooses: the highest utility; of a recording that of its treads."""
        counts = self.trunk if self.recorded is None else treads(self.recorded)
        return max(counts, key=lambda n: (self.utility(alpha, accuracy, n), n))

    def is_edge(self, tokens: int) -> bool:
        """Does one token more cost more? Of a recording, whose noise hides that, what was probed decides."""
        known = self.recorded is not None or tokens == self.vit.tokens
        return known or self.trunk[tokens + 1][0] > self.trunk[tokens][0]


class Outcome(NamedTuple):
    """One staircase and the schedule from it; shares of what probing every count takes."""

    probes: int
    share: float
    counts: int
    seconds: float  # of inference, warm-up included
    regret: float  # utility lost, as a share of the best
    exact: bool


def outcomes(
    source: Source, goals: Sequence[tuple[float, Accuracy]], machine: Machine, rounds: int = 1
) -> list[Outcome]:
    """Probe; then for each goal choose by the paper's utility and probe the edge of the choice, as `build` does."""
    trunks = {n: machine.opener(ms) for n, ms in source.trunk.items()}
    others = {name: machine.opener(ms) for name, ms in source.others.items()}
    how = (source.vit, source.setup_on(machine), trunks.__getitem__, others, rounds)
    probed, samples = probe(*how)
    spent_s = machine.spent_ms / 1e3
    found = []
    for alpha, accuracy in goals:
        tokens = paper_schedule(probed, "pomt", Goal(alpha=alpha), accuracy).tokens
        staircase, machine.spent_ms = probed, 0.0
        if missing := {*tokens} - {*confirmed_edges(probed)}:
            staircase, _ = probe(*how, samples={name: [*ms] for name, ms in samples.items()}, used=missing)
        chosen = on_edges(staircase, tokens)[-1]
        best = source.utility(alpha, accuracy, source.best(alpha, accuracy))
        found.append(
            Outcome(
                probes=staircase.probes,
                share=staircase.probes / (rounds * len(all_counts(source.vit))),
                counts=len(staircase.points),
                seconds=spent_s + machine.spent_ms / 1e3,
                regret=1 - source.utility(alpha, accuracy, chosen) / best,
                exact=chosen in confirmed_edges(staircase) and source.is_edge(chosen),
            )
        )
    return found


def simulated(device: str, vit: Vit, precision: str, batch: int) -> Source:
    """A staircase of the tail-effect model."""
    record = devices.load_device(device)
    setup = Setup(
        device=device, machine=record.title, runtime="simulated", runtime_version="", precision=precision,
        batch=batch, noiseless=True,
    )  # fmt: skip
    trunk = {n: [latency_ms(operations_of_trunk(vit, n, batch), record, precision)] for n in all_counts(vit)}
    return Source(vit, setup, trunk, {FIXED: [0.1], DENSE: [trunk[vit.tokens][0] + 0.1]})


def all_simulated() -> Iterator[Source]:
    """Every simulated Jetson, model shape, precision and batch size."""
    jetsons = [name for name in devices.names() if devices.load_device(name).simulation]
    for device, vit, precision, batch in product(jetsons, SHAPES, PRECISIONS, BATCHES):
        yield simulated(device, vit, precision, batch)


def recordings() -> Iterator[Source]:
    """The golden staircases."""
    for path in sorted(GOLDEN.glob("*.json")):
        found = load(path, Staircase)
        trunk = {p.tokens: p.latency.samples_ms for p in found.points}
        others = {FIXED: found.fixed.samples_ms, DENSE: found.dense.samples_ms}
        yield Source(found.vit, found.setup, trunk, others, found)


def accuracy_of(source: Source) -> Accuracy:
    """The measured curve of a model; ViT-Tiny's for the shapes without one."""
    return ACCURACIES["vit_digits" if source.vit.name == "vit_digits" else "vit_tiny"]


def exhaustive_s(source: Source, rounds: int) -> float:
    """Inference that probing every count takes, s: warm-up, and an untimed one for each that is timed."""
    each = sum(median(ms) for ms in (*source.trunk.values(), *source.others.values()))
    return each * RUNS_PER_TIMING * (WARMUP + rounds) / 1e3


NOISE_HEAD = """
| device | model | batch | precision | noise | within 2 % | mean regret, % | worst, % | edges | share | seconds | of |
| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
HEAD = """| device | model | batch | precision | probes | of | share | counts | seconds | of | regret, % | edges |
| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def quiet_row(source: Source) -> dict[str, object]:
    """The most probes and regret over ALPHAS and both curves, nothing disturbing the machine."""
    found = outcomes(source, list(product(ALPHAS, ACCURACIES.values())), Machine())
    most = max(found)
    setup = source.setup
    row: dict[str, object] = {
        "device": setup.device, "model": source.vit.name, "batch": setup.batch, "precision": setup.precision,
        "probes": most.probes, "all_probes": len(all_counts(source.vit)), "share": most.share,
        "counts": most.counts, "seconds": most.seconds, "all_seconds": exhaustive_s(source, 1),
        "regret": max(o.regret for o in found), "exact": sum(o.exact for o in found), "runs": len(found),
    }  # fmt: skip
    print(
        "| {device} | {model} | {batch} | {precision} | {probes} | {all_probes} | {share:.1%} | {counts} | "
        "{seconds:.2f} | {all_seconds:.2f} | {0:.2f} | {exact}/{runs} |".format(
            100 * max(o.regret for o in found), **row
        ),
        flush=True,
    )
    return row


def noisy_sources() -> Iterator[Source]:
    """A few staircases, from coarse to fine, to be disturbed."""
    yield simulated("agx-orin", SHAPES[0], "fp32", 1)
    yield simulated("orin-nano", SHAPES[0], "fp16", 4)
    yield simulated("jetson-tx2", SHAPES[1], "fp32", 8)


def noisy_row(source: Source, noise: str, runs: int) -> dict[str, object]:
    """How many seeded runs stay within 2 % of the best utility, alpha 0.5."""
    goal = [(0.5, accuracy_of(source))]
    found = [o for seed in range(runs) for o in outcomes(source, goal, Machine(noise, seed), ROUNDS)]
    regrets = np.array([o.regret for o in found])
    setup = source.setup
    row: dict[str, object] = {
        "device": setup.device, "model": source.vit.name, "batch": setup.batch, "precision": setup.precision,
        "noise": noise, "runs": runs, "within": int((regrets <= 0.02).sum()), "mean_regret": float(regrets.mean()),
        "worst_regret": float(regrets.max()), "share": max(o.share for o in found),
        "exact": sum(o.exact for o in found), "seconds": float(np.mean([o.seconds for o in found])),
        "all_seconds": exhaustive_s(source, ROUNDS),
    }  # fmt: skip
    print(
        "| {device} | {model} | {batch} | {precision} | {noise} | {within}/{runs} | {0:.2f} | {1:.2f} | "
        "{exact}/{runs} | {share:.1%} | {seconds:.1f} | {all_seconds:.1f} |".format(
            100 * regrets.mean(), 100 * regrets.max(), **row
        ),
        flush=True,
    )
    return row


def main() -> None:
    """Probe, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="seeded runs for each kind of noise")
    args = parser.parse_args()
    print(HEAD)
    quiet = [quiet_row(source) for source in all_simulated()]
    print(NOISE_HEAD)
    noisy = [noisy_row(source, noise, args.runs) for source, noise in product(noisy_sources(), NOISES)]
    noisy += [noisy_row(source, "recorded", args.runs) for source in recordings()]
    print(json.dumps({"quiet": quiet, "noisy": noisy}))


if __name__ == "__main__":
    main()
