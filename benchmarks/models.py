"""Which timm VisionTransformers export: each with a folding schedule, ONNX Runtime's logits against PyTorch's.

python benchmarks/models.py [--only PATTERN] [--resume FILE] [--out docs/models.md] [--memory-gib 10] [--minutes 20]
Weights are random, then shaken so that no zero hides a term. Each architecture runs in a child process of its own,
small ones first; results are kept in the --resume file as they come, and a name found there is not run again.
Names whose modules are built alike share a result. Writes a Markdown table and prints one JSON line last.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import hashlib
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch

from edgeprune.errors import EdgepruneError
from edgeprune.families import family_of
from edgeprune.fidelity import pruned_module
from edgeprune.graph import OPSET, load_graph, static_or_raise
from edgeprune.models import load_model
from edgeprune.pipeline import export_model
from edgeprune.records import Schedule, Vit, save
from edgeprune.target import target_for

METHOD = "fold"
KEPT = (0.7, 0.5, 0.35)  # of all tokens, after a cut at a quarter, half and three quarters of the depth
NOISE = 0.02  # of the parameters' noise, as wide as timm's initial weights
TOLERANCE = 1e-3  # largest difference of logits in units of their standard deviation
COPIES = 2.2  # of its weights that a child holds at least: PyTorch's and those under way to the ONNX
PACKAGES = ("timm", "torch", "onnx", "onnxruntime")
Row = dict[str, Any]


def names() -> list[str]:
    """What timm registers in the modules of its plain VisionTransformer, without deprecated names."""
    return sorted({*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")})


def surveyed(name: str) -> Row:
    """Parameters, an architecture's fingerprint, and why it is refused; without memory for weights.

    The fingerprint covers every module's type and settings and every tensor's shape: equal ones compute the same.
    """
    with torch.device("meta"):
        module = timm.create_model(name)
    digest = hashlib.sha256()
    for key, part in module.named_modules():
        told = {k: v for k, v in vars(part).items() if k[0] != "_" and k not in ("pretrained_cfg", "default_cfg")}
        text = f"{key} {type(part)} {part.extra_repr()} {sorted(told.items(), key=str)}"
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", text).encode())
    for key, tensor in module.state_dict().items():
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
    row: Row = {"name": name, "parameters": sum(p.numel() for p in module.parameters())}
    row |= {"fingerprint": digest.hexdigest()[:16], "refused": None}
    try:
        family_of(module)
    except EdgepruneError as error:
        row["refused"] = str(error)
    return row


def folding(vit: Vit) -> Schedule:
    """Three cuts; the last block for the prefix alone where the head reads nothing else."""
    tokens = [vit.tokens] * vit.depth
    for quarter, share in enumerate(KEPT, 1):
        keep = max(round(share * vit.tokens), vit.prefix + 1)
        start = quarter * vit.depth // 4
        tokens[start:] = [keep] * (vit.depth - start)
    last = vit.prefix_pooled and len(set(tokens[-2:])) == 1
    return Schedule(
        vit=vit, method=METHOD, policy="benchmark", tokens=tuple(tokens), prefix_last=last,
        predicted_ms=0.0, staircase_sha256="0" * 64,
    )  # fmt: skip


def tried(name: str) -> Row:
    """Create, export, run, compare one model. Raises EdgepruneError and whatever a library raises."""
    torch.manual_seed(0)
    model = load_model(name, "random")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    vit, schedule = model.vit, folding(model.vit)
    image = np.random.default_rng(0).standard_normal((1, 3, vit.image_px, vit.image_px), dtype=np.float32)
    with torch.inference_mode():
        module = pruned_module(model, schedule.method, schedule.tokens, schedule.prefix_last)
        wanted = module(torch.from_numpy(image)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        save(schedule, Path(folder) / "schedule.json")
        path = export_model(model, Path(folder) / "schedule.json", 1, Path(folder) / "model.onnx")
        del model, module
        gc.collect()
        graph = load_graph(path)
        static_or_raise(graph)
        assert [(o.domain, o.version) for o in graph.opset_import if o.domain in ("", "ai.onnx")] == [("", OPSET)]
        onnx.checker.check_model(os.fspath(path))
        with target_for("cpu").opener(path)() as session:
            found = session.infer(image)
        outside = sum(file.stat().st_size for file in Path(folder).glob("*.weights"))
    scale = float(wanted.std())
    worst = float(np.abs(wanted - found).max()) / scale
    row: Row = {"tokens": vit.tokens, "cuts": schedule.cuts, "prefix_last": schedule.prefix_last, "depth": vit.depth}
    row |= {"difference": worst, "scale": scale, "outside_bytes": outside}
    ok = np.isfinite(worst) and scale > 0 and worst <= TOLERANCE
    return row | {"ok": bool(ok), "reason": "" if ok else f"logits differ by {worst:.1e} of their deviation"}


def child(name: str, memory_bytes: int, limit_s: float) -> Row:
    """`tried` in a process of its own, ended where it takes more memory or time than allowed."""
    begin = time.monotonic()
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_told, args=(name, sender))
    process.start()
    sender.close()
    row: Row = {"ok": False, "reason": ""}
    while process.is_alive() and not receiver.poll(0.5):
        if _held_bytes(process.pid) > memory_bytes:
            row |= {"tried": False, "reason": f"not tried here: more than {memory_bytes / 2**30:.0f} GiB of memory"}
        elif time.monotonic() - begin > limit_s:
            row |= {"tried": False, "reason": f"not tried here: more than {limit_s / 60:.0f} minutes"}
        if row["reason"]:
            process.kill()
    try:
        row |= {} if row["reason"] else receiver.recv()
    except EOFError:
        row["reason"] = f"ended with {process.exitcode}"
    process.join()
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def _held_bytes(pid: int | None) -> int:
    """Memory of a process that the system cannot take back; 0 once it has ended."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _told(name: str, sender: Connection) -> None:
    """The child's own: what came of a model, sent to the parent."""
    try:
        row = tried(name)
    except Exception as error:  # whatever a library raises is the model's reason
        row = {"ok": False, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sender.send(row | {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)})


def results(rows: list[Row], kept: Path, memory_bytes: int, limit_s: float) -> list[Row]:
    """A result for every survey row: known from the file, refused, too large, shared, or from a child now."""
    known: dict[str, Row] = {}
    for line in kept.read_text().splitlines() if kept.exists() else ():
        row = json.loads(line)
        known[row["name"]] = row
    first: dict[str, str] = {}
    done = []
    for row in sorted(rows, key=lambda r: (r["parameters"], r["name"])):
        name, twin = row["name"], first.setdefault(row["fingerprint"], row["name"])
        need = COPIES * 4 * row["parameters"]
        if row["refused"]:
            found = {"ok": False, "refused": True, "reason": row["refused"]}
        elif twin != name:
            found = {**next(r for r in done if r["name"] == twin), "same_as": twin}
        elif name in known:
            found = known[name]
        elif need > memory_bytes:
            gib = 4 * row["parameters"] / 2**30
            found = {"ok": False, "tried": False, "reason": f"not tried here: {gib:.1f} GiB of weights"}
        else:
            found = child(name, memory_bytes, limit_s)
            with open(kept, "a") as file:
                file.write(json.dumps({"name": name, **found}) + "\n")
            print(name, found["reason"] or f"ok {found['difference']:.1e}", f"{found['seconds']} s", file=sys.stderr)
        done.append({**found, "name": name, "parameters": row["parameters"]})
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="*"); parser.add_argument("--resume", type=Path, default=Path("/tmp/w/models.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # what an export imports and registers, children need not
        export_model(load_model("test_vit", "random"), None, 1, Path(folder) / "warm.onnx")
    if True:
        rows = [surveyed(n) for n in names() if fnmatch.fnmatch(n, args.only)]
        print(len({r["fingerprint"] for r in rows}), file=sys.stderr)
        r = results(rows, args.resume, 10 << 30, 1200)
        print(json.dumps(r))
