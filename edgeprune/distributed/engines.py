"""Outputs of ONNX files that run on a CPU, by Ray tasks over blocks of pictures; the same bits as in one process."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.distributed import cluster
from edgeprune.distributed.cluster import ray_module, received
from edgeprune.onnx_graph.graph import weights_of
from edgeprune.onnx_graph.onnx_runtime import threads
from edgeprune.records import Device, Preprocessing, Setup
from edgeprune.runtimes import Session, runtime_for
from edgeprune.runtimes.inference import logits_of
from edgeprune.runtimes.quiet import evaluating
from edgeprune.runtimes.remote.runtime import RemoteRuntime
from edgeprune.runtimes.target import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

LEAST = 64  # pictures of a task
_sessions: dict[str, Session] = {}  # of this worker: the one used last


def can_spread(target: Target) -> bool:
    """Can the nodes of the cluster run the engines of a target? Only ONNX Runtime on a CPU, with as many threads."""
    if target.setup.runtime not in ("ort-cpu", "simulated") or isinstance(target.runtime, RemoteRuntime):
        return False
    most = max(node["Resources"].get("CPU", 0) for node in ray_module().nodes() if node["Alive"])
    if most < threads():
        log.info("no node of the cluster has the %d CPUs of one inference: evaluating images here", threads())
    return bool(most >= threads())


def stored(pixels: NDArray[np.uint8], batch: int) -> list[Any]:
    """Pictures (images, H, W, 3) in Ray's object store, as blocks of whole batches for `spread_logits`."""
    return cluster.stored(pixels, -(-LEAST // batch) * batch)


def spread_logits(target: Target, file: Path, blocks: Sequence[Any], how: Preprocessing) -> NDArray[np.float32]:
    """(images, classes) fp32 outputs for the pictures in `stored` blocks. Raises HostError, EdgepruneError.

    Batches are those of one process, and a task has the threads that one process has: so are the bits.
    """
    ray = ray_module()
    files = ray.put({path.name: path.read_bytes() for path in (file, *weights_of(file))})
    task = ray.remote(num_cpus=threads(), max_retries=-1)(outputs)
    given = (files.hex(), file.name, [files], target.device, target.setup, how, threads())
    answers = [task.remote(*given, block) for block in blocks]
    rows = []
    for index, answer in enumerate(answers):
        target.progress("evaluating blocks of images on Ray", index, len(blocks))
        rows += received([answer])
    target.progress("evaluating blocks of images on Ray", len(blocks), len(blocks))
    return np.concatenate(rows)


def outputs(
    key: str,
    name: str,
    files: list[Any],
    device: Device,
    setup: Setup,
    how: Preprocessing,
    threads: int,
    pixels: NDArray[np.uint8],
) -> NDArray[np.float32]:
    """Outputs (images, classes) for a block of pictures (images, H, W, 3); runs on a node.

    `files` holds a reference to the content of the ONNX file `name` and of its weights, `key` names it.
    """
    os.environ["EDGEPRUNE_THREADS"] = str(threads)
    with evaluating():
        if key not in _sessions:
            _sessions.clear()
            with tempfile.TemporaryDirectory() as folder:
                for each, content in ray_module().get(files[0]).items():
                    Path(folder, each).write_bytes(content)
                session = runtime_for(device, setup.simulated).open(Path(folder, name), setup)
                _sessions[key] = session.__enter__()
                return logits_of(
                    session, pixels, how, setup.batch
                )  # a simulation reads the file when it first infers
        return logits_of(_sessions[key], pixels, how, setup.batch)
