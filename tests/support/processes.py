"""Builds in processes of their own that kill or interrupt themselves at a chosen moment; a small model to build."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from edgeprune.latency.probing import FEW
from edgeprune.pipeline.context import Options

FORKS = multiprocessing.get_context("forkserver")  # from a process that has loaded all that a build imports
FORKS.set_forkserver_preload(["support.preload"])


def fork(target: Callable[..., None], *arguments: object) -> Any:
    """A started process."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the server finds its modules by it
        process = FORKS.Process(target=_loaded, args=(target, arguments))
        process.start()
    return process


def _loaded(target: Callable[..., None], arguments: Sequence[object]) -> None:
    assert "support.preload" in sys.modules, "the server that forks could not import what it was to preload"
    target(*arguments)


def shallow_vit(depth: int = 2) -> Any:
    """The first blocks of the embedded model: (B, 3, 28, 28) -> (B, 10), 197 tokens; exported within seconds.

    Two classify 82 % of the digits, three 99 %.
    """
    from safetensors.torch import load_file

    from edgeprune import zoo

    model = zoo.vit_digits()
    model.load_state_dict(load_file(zoo.WEIGHTS), strict=True)
    model.blocks = model.blocks[:depth]
    return model.eval()


def write_shallow(folder: Path, work: Path) -> None:
    """The first three blocks of the embedded model, in a folder as timm's `local-dir:` takes it.

    And a work folder with their profiling models: fp32, batch 1, the cuts of topk.
    """
    from safetensors.torch import save_file

    from edgeprune import zoo
    from edgeprune.pipeline.profile import profiling_models
    from edgeprune.runtimes.target import target_for
    from edgeprune.vit.models import load_model

    module = shallow_vit(3)
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    shape = {"img_size": 28, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    how = {key: value for key, value in zoo.vit_digits().pretrained_cfg.items() if key != "architecture"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": shape, "pretrained_cfg": how}
    (folder / "config.json").write_text(json.dumps(config))
    profiling_models(target_for("cpu", work=work), load_model(f"local-dir:{folder}"), ("topk",))


def fork_and_join(target: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own, where it must succeed."""
    process = fork(target, *arguments)
    process.join()
    assert process.exitcode == 0, target.__name__


def on_replace(act: Callable[[str, bool], None]) -> None:
    """In this process, call act(file name, done) before and after each replacement or renaming of a file."""
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def wrapped(source: Any, target: Any, real: Callable[..., None] = real, **options: Any) -> None:
            act(Path(target).name, False)
            real(source, target, **options)
            act(Path(target).name, True)

        setattr(os, name, wrapped)


def die() -> None:
    """As kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(event: int) -> None:
    """Die at the event of this number: a file is written, is about to replace another, has replaced it."""
    left = event

    def count(*_: object) -> None:
        nonlocal left
        if left == 0:
            die()
        left -= 1

    on_replace(count)
    fsync = os.fsync

    def synced(handle: int) -> None:
        count()
        fsync(handle)

    os.fsync = synced


def measure_few(rounds: int = FEW) -> None:
    """Fewer rounds for a staircase than users get, by default the fewest that show a step, and a short warm-up."""
    from edgeprune.benchmark import bench, peak
    from edgeprune.latency import probing, profiling, timing
    from edgeprune.pipeline import measure

    profiling.ROUNDS, probing.WARMUP_MS = rounds, 0.0
    timing.WARMUP_MS = measure.WARMUP_MS = bench.WARMUP_MS = 20.0
    # Latencies of test processes that share two cores are not stable after ten seconds, either.
    timing.WARMUP_S = peak.WARMUP_S = 0.1


def search_less(put: Callable[[Any, str, int], None] = setattr) -> None:
    """Evaluate fewer schedules in this process than users get, where the choice need not be as good."""
    from edgeprune.scheduling import search

    for name, value in (("SAMPLED", 4), ("EVALUATED", 12), ("STEPS", 10)):
        assert getattr(search, name) > value
        put(search, name, value)


def die_after_saves(rounds: int, saves: int) -> None:
    """Die when the samples of a staircase have been saved so many times."""
    measure_few(rounds)
    after_saves(saves, die)


def after_saves(saves: int, act: Callable[[], None]) -> None:
    """Call `act` when the samples of a staircase have been saved so many times."""
    left = saves

    def count(name: str, done: bool) -> None:
        nonlocal left
        left -= done and name.startswith("samples-")
        if done and left == 0:
            act()

    on_replace(count)


def _build(options: Options, prepare: Callable[..., None] | None, arguments: Sequence[object]) -> None:
    from edgeprune.pipeline.build import build

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if prepare is not None:
        prepare(*arguments)
    build(options)


def started(options: Options, prepare: Callable[..., None] | None = None, *arguments: object) -> Any:
    """A process that builds, after prepare(*arguments) in it."""
    return fork(_build, options, prepare, arguments)


def exit_code(options: Options, prepare: Callable[..., None] | None = None, *arguments: object) -> int:
    """How a process ends that builds: 0, or the negative number of a signal."""
    process = started(options, prepare, *arguments)
    process.join()
    code: int = process.exitcode
    return code


def _command(argv: Sequence[str], out: Path, err: Path, saves: int | None, variables: dict[str, str]) -> None:
    from edgeprune.cli import main

    os.environ.update(variables)
    search_less()
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if saves is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        after_saves(saves, lambda: os.kill(os.getpid(), signal.SIGINT))
    sys.argv = ["edgeprune", *argv]
    main()


def command(
    folder: Path, *argv: object, interrupt_after: int | None = None, **variables: str
) -> tuple[int, str, str]:
    """A command in a process of its own: exit code, stdout and stderr, which it leaves in `folder`.

    With `interrupt_after` it meets Ctrl-C when it has saved the samples of a staircase so many times. Its environment
    is that of the process it is forked from, not the one of this process, and `variables`.
    """
    out, err = folder / "stdout", folder / "stderr"
    process = fork(_command, list(map(str, argv)), out, err, interrupt_after, variables)
    process.join()
    return process.exitcode, out.read_text(), err.read_text()
