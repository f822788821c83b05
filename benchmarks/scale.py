"""Evaluation of schedules on Ray with 1, 2 and 4 workers of one thread: efficiency, overhead of a task, bytes sent.

    python benchmarks/scale.py --model vit_tiny_patch16_224 --weights random --images DIR

Each round times every number of workers once, in turn, on nodes of one CPU each. The last line is one JSON object. On
paper: what the same constants give for many pictures and schedules on many machines.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgeprune import zoo
from edgeprune.distributed.cluster import connected
from edgeprune.distributed.evaluate import BLOCK, GROUP, SpreadEvaluator, group_size
from edgeprune.images import load_images, load_pixels
from edgeprune.scheduling.goals import single_cut

WORKERS = (1, 2, 4)
MANY_IMAGES, MANY_SCHEDULES, MACHINES, CORES = 50_000, 200, (8, 64), 16
NETWORK_BYTES_S = 1e9 / 8  # gigabit Ethernet


def schedules_of(vit: Any, count: int) -> list[Any]:
    """Single cuts, evenly spread over blocks and token counts, with the unpruned schedule as their base."""
    dense, blocks = (vit.tokens,) * vit.depth, range(vit.depth - 1)
    shares = np.linspace(0.25, 0.9, -(-count // len(blocks)))
    return [
        (single_cut(vit, block, max(int(s * vit.tokens), vit.prefix + 2)), dense) for block in blocks for s in shares
    ][:count]


def empty(block: Any) -> None:
    """A task that computes nothing: what is left is its overhead."""


def measured(model: Any, pixels: Any, workers: int, schedules: Sequence[Any]) -> dict[str, Any]:
    """Seconds of the evaluation on nodes of one CPU each, when all are warm, and the overhead of a task, s."""
    import ray
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 200_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    try:
        for _ in range(workers):
            nodes.add_node(num_cpus=1, **store)
        with connected(nodes.address):
            spread = SpreadEvaluator(model, "fold", pixels)
            list(spread.logits(schedules[: GROUP * workers]))  # loads PyTorch and the model everywhere
            start = time.perf_counter()
            rows = [logits for _, logits in spread.logits(schedules)]
            seconds = time.perf_counter() - start
            task, block = ray.remote(num_cpus=1)(empty), ray.put(pixels[:BLOCK])
            ray.get([task.remote(block) for _ in range(8 * workers)])
            start = time.perf_counter()
            ray.get([task.remote(block) for _ in range(200)])
            overhead = (time.perf_counter() - start) / 200 * workers
    finally:
        nodes.shutdown()
    return {"s": seconds, "task_overhead_s": overhead, "rows": np.stack(rows)}


def one_process(model: Any, pixels: Any, schedules: Sequence[Any]) -> dict[str, Any]:
    """Seconds of the same evaluation without Ray, with one thread."""
    import torch

    from edgeprune.vit.fidelity import Evaluator

    torch.set_num_threads(1)
    evaluator = Evaluator(model, "fold", pixels)
    evaluator.logits(schedules[0][0])
    start, rows = time.perf_counter(), []
    for tokens, base in schedules:
        evaluator.base(base)
        rows.append(evaluator.logits(tokens))
    return {"s": time.perf_counter() - start, "rows": np.stack(rows)}


def on_paper(task_s: float, overhead_s: float, sent: dict[str, float], machines: int) -> dict[str, float]:
    """Many pictures and schedules on machines of CORES cores; pictures and weights come over the network once."""
    tasks = ceil(MANY_IMAGES / BLOCK) * ceil(MANY_SCHEDULES / GROUP)
    compute = ceil(tasks / (machines * CORES)) * (task_s + overhead_s)
    network = machines * (sent["weights_bytes"] + MANY_IMAGES * sent["picture_bytes"]) / NETWORK_BYTES_S  # from one
    results = MANY_IMAGES * MANY_SCHEDULES * sent["row_bytes"] / NETWORK_BYTES_S
    alone = tasks * task_s / CORES
    whole = max(compute, network + results)
    return {
        "machines": machines, "tasks": tasks, "compute_h": compute / 3600, "network_h": (network + results) / 3600,
        "one_machine_h": alone / 3600, "efficiency": alone / machines / whole,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=zoo.EMBEDDED)
    parser.add_argument("--weights")
    parser.add_argument("--images", type=Path, default=zoo.images_dir() / "labels.csv")
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--schedules", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    from ray.cloudpickle import Pickler

    from edgeprune.vit.models import load_model
    from edgeprune.vit.packing import packed

    model = load_model(args.model, args.weights)
    pixels = load_pixels(load_images(args.images).paths[: args.count], model.preprocessing)
    schedules = schedules_of(model.vit, args.schedules)
    seconds: dict[str, list[float]] = {}
    overheads: list[float] = []
    same = True
    for _ in range(args.rounds):
        alone = one_process(model, pixels, schedules)
        seconds.setdefault("one process", []).append(alone["s"])
        for workers in WORKERS:
            found = measured(model, pixels, workers, schedules)
            seconds.setdefault(str(workers), []).append(found["s"])
            overheads.append(found["task_overhead_s"])
            same &= bool(np.array_equal(alone["rows"], found["rows"]))
    middle = {name: median(values) for name, values in seconds.items()}
    blocks = ceil(len(pixels) / BLOCK)
    tasks = blocks * ceil(len(schedules) / group_size(len(schedules), blocks, 1))  # with one worker
    sent = {
        "weights_bytes": float(sum(array.nbytes for array in packed(model, Pickler).arrays)),
        "picture_bytes": pixels[0].nbytes,
        "row_bytes": 4 * model.vit.classes,
    }
    for name, value in middle.items():
        workers = int(name) if name.isdigit() else 1
        efficiency = middle["1"] / value / workers
        print(f"{name:>12}  {value:7.2f} s  efficiency {efficiency:.2f}")
    task_s, overhead = middle["1"] / tasks, median(overheads)
    result = {
        "model": model.vit.name, "pictures": len(pixels), "schedules": len(schedules), "tasks": tasks,
        "cores": os.cpu_count(), "rounds": args.rounds, "seconds": seconds, "bit_equal": same,
        "efficiency": {str(n): middle["1"] / middle[str(n)] / n for n in WORKERS},
        "task_s": task_s, "task_overhead_s": overhead, **sent,
        "on_paper": [on_paper(task_s, overhead, sent, machines) for machines in MACHINES],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
