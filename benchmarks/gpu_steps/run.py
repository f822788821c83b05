"""What all steps share: the state of a run, its parts and their results, engines built in parallel processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgeprune.errors import DeviceError, EdgepruneError, EngineError, MissingError
from edgeprune.runtimes import Session
from edgeprune.runtimes.target import Target, target_for
from edgeprune.runtimes.trt import TensorRT
from edgeprune.runtimes.trt_log import MIB
from gpu_steps import green_context
from gpu_steps.kit import onnx_in, read_json, static_onnx, weights_key, write_json

ATTEMPTS = 2  # at a part that ended its process; then it counts as failed and the others go on
BUILDER_BYTES = 2048 * MIB  # of a GPU, that a builder takes besides its workspace
Parts = dict[str, Callable[[], Any]]


class Skipped(Exception):
    """A part that cannot run on this machine; the message is the reason."""


class OutOfTime(Exception):
    """The time of this call is used up: the part is left for the next call."""


class EngineSpec(NamedTuple):
    """An engine: a graph of a model in the kit, in a precision; `tokens` fixes the token axis of a block.

    `form` is a form of ONNX files (kit.FORMS) other than the one that edgeprune exports for the precision.
    """

    folder: Path
    name: str
    precision: str
    batch: int
    tokens: int | None = None
    form: str = ""


@dataclass(frozen=True)
class Run:
    """One call. `out` gets the results, `work` keeps engines; `until` is when no new work starts, by time.time()."""

    kit: Path
    out: Path
    work: Path
    device: str = "cuda"
    simulated: str = "h100"
    jobs: int = 8
    samples: int = 300  # of step 4
    rounds: int = 200  # of step 7
    stairs: int = 30  # rounds of step 5
    sm_limit: int | None = None
    until: float = float("inf")

    def target(self, precision: str, batch: int) -> Target:
        """The target that is measured. Raises DeviceError, MissingError."""
        return target_for(self.device, precision, batch, work=self.work)

    def need_tensorrt(self) -> None:
        """Raise Skipped where the device is not run by TensorRT."""
        if self.target("fp32", 1).setup.runtime != "trt":
            raise Skipped(f"needs TensorRT, and {self.device} runs on ONNX Runtime")

    def need(self, precision: str) -> None:
        """Raise Skipped where the runtime or the GPU has no such precision."""
        try:
            self.target(precision, 1)
        except DeviceError as error:
            raise Skipped(str(error)) from None

    def onnx(self, spec: EngineSpec) -> Path:
        """The ONNX file of an engine."""
        kind = spec.form or self.target(spec.precision, spec.batch).onnx_precision
        if spec.tokens is None:
            return onnx_in(spec.folder, spec.name, kind, self.work)
        return static_onnx(spec.folder, spec.name, kind, spec.tokens, self.work)

    def opener(self, spec: EngineSpec) -> Callable[[], Session]:
        """A function that opens an engine, which is compiled now if it is not in the work folder."""
        return self.target(spec.precision, spec.batch).opener(self.onnx(spec), weights_key(spec.folder))

    def build(self, specs: Sequence[EngineSpec]) -> dict[EngineSpec, str]:
        """Compile engines in up to `jobs` processes; the errors of those that failed.

        Graphs are converted first, by this process. With several processes tactics are timed while other builds use
        the GPU: an engine may be slower than one that was built alone, and the timings are thrown away. Raises
        OutOfTime, EngineError where a process was killed.
        """
        for spec in specs:
            self.onnx(spec)
        if (jobs := builds_at_once(self.target("fp32", 1), self.jobs)) == 1:
            results = [_built(self, spec) for spec in specs]
        else:
            context = multiprocessing.get_context("spawn")
            with (
                tempfile.TemporaryDirectory() as timings,
                ProcessPoolExecutor(jobs, context, green_context.limit, (self.sm_limit,)) as pool,
            ):
                count = len(specs)
                try:
                    results = list(pool.map(_built, [self] * count, specs, [Path(timings)] * count))
                except BrokenProcessPool:
                    raise EngineError(
                        "a process that built engines was killed, probably because memory ran out: call this step "
                        "again with --jobs 1"
                    ) from None
        if None in results:
            raise OutOfTime
        return {spec: error for spec, error in zip(specs, results, strict=True) if error}

    @cached_property
    def about(self) -> dict[str, Any]:
        """What was measured: GPU, versions, options."""
        setup = msgspec.to_builtins(self.target("fp32", 1).setup)
        keys = ("machine", "gpu", "sm_count", "compute_capability", "runtime", "runtime_version", "options")
        return {"device": self.device, "sm_limit": self.sm_limit} | {key: setup.get(key) for key in keys}


def builds_at_once(target: Target, most: int) -> int:
    """How many engines can be compiled at the same time: one where the GPU uses the CPU's memory."""
    runtime, setup = target.runtime, target.setup
    if not isinstance(runtime, TensorRT):
        return most
    if runtime.shared:
        return 1
    return max(min(most, runtime.free_bytes() // ((setup.workspace_mib or 0) * MIB + BUILDER_BYTES)), 1)


def _built(run: Run, spec: EngineSpec, timings: Path | None = None) -> str | None:
    """Compile one engine: "" where that succeeded, the error where not, None where the time is used up.

    `timings` is the folder of TensorRT's timing cache, if not that of the engine.
    """
    if time.time() > run.until:
        return None
    try:
        target = run.target(spec.precision, spec.batch)
        if isinstance(target.runtime, TensorRT):
            target.runtime.timings = timings
        target.engine(run.onnx(spec), weights_key(spec.folder))
    except EdgepruneError as error:
        return " ".join(str(error).split())
    return ""


def carried_out(run: Run, step: int, title: str, parts: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run the parts of a step that are not finished; the content of OUT/step-N.json, which is written after each.

    Finished parts are kept; those that were skipped or failed are tried again. A part that twice ended its process,
    by a crash or the time limit of a call, counts as failed.
    """
    path, begun = run.out / f"step-{step}.json", time.time()
    before = read_json(path) if path.exists() else {}
    attempts: dict[str, int] = before.get("attempts", {})
    spent: float = before.get("seconds", 0.0)
    state: dict[str, Any] = {"step": step, "title": title, "about": run.about, "parts": before.get("parts", {})}
    state |= {"skipped": {}, "failed": {}, "left": list(parts), "attempts": attempts}

    def keep() -> None:
        write_json(path, state | {"complete": not state["left"], "seconds": round(spent + time.time() - begun, 1)})

    for name, work in parts.items():
        if name not in state["parts"]:
            if time.time() > run.until:
                continue
            if attempts.get(name, 0) >= ATTEMPTS:
                state["failed"][name] = f"the process ended in {ATTEMPTS} attempts: see the output of those calls"
                state["left"].remove(name)
                continue
            attempts[name] = attempts.get(name, 0) + 1
            keep()
            try:
                state["parts"][name] = work()
            except OutOfTime:
                del attempts[name]
                continue
            except (Skipped, MissingError) as reason:
                state["skipped"][name] = str(reason)
            except EdgepruneError as error:
                state["failed"][name] = " ".join(str(error).split())
            del attempts[name]
        state["left"].remove(name)
    keep()
    found: dict[str, Any] = read_json(path)
    return found


@contextlib.contextmanager
def opened(run: Run, spec: EngineSpec) -> Iterator[Session]:
    """A session of an engine."""
    with run.opener(spec)() as session:
        yield session
