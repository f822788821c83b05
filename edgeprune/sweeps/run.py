"""Runs the builds of a sweep; a failure is a result, and finished builds are kept for --resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from edgeprune.bundles.format import MANIFEST, load_bundle
from edgeprune.errors import REPORT, EdgepruneError
from edgeprune.io import decode, read_bytes, save, sha256_file
from edgeprune.pipeline.auto import build_fastest
from edgeprune.pipeline.build import build
from edgeprune.pipeline.context import Options
from edgeprune.records import Progress, Record
from edgeprune.sweeps.plan import AUTO, Job, boards_of

log = logging.getLogger(__name__)

RESULTS = "results"  # the folder of stored results below that of the sweep
Watch = Callable[[Job, str], None]  # receives what a build is doing


class Outcome(Record, frozen=True, kw_only=True):
    """How a build ended: with a bundle, or with an error of one line."""

    job: Job
    bundle: str | None = None
    error: str | None = None


class Stored(Record, frozen=True, kw_only=True):
    """A finished build, under the hash of its inputs; `manifest_sha256` says whether the bundle is still that one."""

    key: str
    bundle: str  # below the folder of the sweep
    manifest_sha256: str


class Executor(Protocol):
    """One way of running builds. Builds of one board never run at the same time."""

    def run(self, boards: Mapping[str, Sequence[Job]], work: Path, out: Path, watch: Watch) -> Iterator[Outcome]:
        """Run all builds and yield each when it has ended; closing the iterator stops those that run."""
        ...


class InProcess:
    """Runs one build after another in this process."""

    def run(self, boards: Mapping[str, Sequence[Job]], work: Path, out: Path, watch: Watch) -> Iterator[Outcome]:
        """As in Executor."""
        for jobs in boards.values():
            for job in jobs:
                watch(job, "starting")
                yield outcome_of(job, job.options(work, out), lambda *what, job=job: watch(job, words(*what)))


def outcome_of(job: Job, options: Options, progress: Progress) -> Outcome:
    """Run one build; any error but an interrupt is its outcome."""
    try:
        run = build_fastest if job.precision == AUTO else build
        return Outcome(job=job, bundle=str(run(options, progress).path))
    except EdgepruneError as error:
        return Outcome(job=job, error=" ".join(str(error).split()))
    except Exception as error:  # one defect must not end a night of builds; its trace is in the log
        log.debug("%s failed", job.name, exc_info=True)
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Outcome(job=job, error=f"{detail}: {REPORT}")


def words(what: str, done: int, total: int) -> str:
    """A call of Progress as a few words."""
    return f"{what} {min(done + 1, total)} of {total}" if 1 < total < 100_000 else what


def finished(jobs: Sequence[Job], out: Path) -> dict[str, Outcome]:
    """The results that an earlier run has left, by the name of the build: same inputs, bundle complete."""
    found: dict[str, Outcome] = {}
    for job in jobs:
        path = _result(job, out)
        try:
            stored = decode(read_bytes(path), Stored, str(path)) if path.is_file() else None
            if stored is None or stored.key != job.key():
                continue
            load_bundle(bundle := out / stored.bundle)
            if sha256_file(bundle / MANIFEST) == stored.manifest_sha256:
                found[job.name] = Outcome(job=job, bundle=str(bundle))
        except EdgepruneError as error:
            log.debug("%s is built again: %s", job.name, error)
    return found


def run_sweep(
    jobs: Sequence[Job],
    executor: Executor,
    work: Path,
    out: Path,
    resume: bool = False,
    max_failures: int | None = None,
    watch: Watch = lambda job, state: None,
    ended: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the builds and return their outcomes in the order of `jobs`.

    With `resume`, finished builds of an earlier run are taken as they are; failed ones are tried again. After more
    than `max_failures` failures the rest is not run, and has that as its error. Raises OutputError.
    """
    outcomes = finished(jobs, out) if resume else {}
    for outcome in outcomes.values():
        ended(outcome)
    failures = 0
    left = boards_of([job for job in jobs if job.name not in outcomes])
    with closing(executor.run(left, work, out, watch)) as running:  # type: ignore[type-var]
        for outcome in running:
            outcomes[outcome.job.name] = outcome
            if outcome.bundle is not None:
                _store(outcome, out)
            failures += outcome.error is not None
            ended(outcome)
            if max_failures is not None and failures > max_failures:
                break
    for job in jobs:
        if job.name not in outcomes:
            error = f"not run after {failures} failures: correct them, then pass --resume"
            outcomes[job.name] = Outcome(job=job, error=error)
            ended(outcomes[job.name])
    return [outcomes[job.name] for job in jobs]


def _store(outcome: Outcome, out: Path) -> None:
    assert outcome.bundle is not None
    bundle = Path(outcome.bundle)
    place, manifest = os.path.relpath(bundle, out), sha256_file(bundle / MANIFEST)
    save(Stored(key=outcome.job.key(), bundle=place, manifest_sha256=manifest), _result(outcome.job, out))


def _result(job: Job, out: Path) -> Path:
    return out / RESULTS / f"{job.name}.json"
