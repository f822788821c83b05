"""Which timm VisionTransformers and Evas export: each with a folding schedule, ONNX Runtime against PyTorch.

python benchmarks/models.py [--only PATTERNS] [--resume FILE] [--out docs/models.md] [--memory-gib 10] [--minutes 20]
Weights are random, then shaken so that no zero hides a term. Each architecture runs in a child process of its own,
small ones first; results are kept in the --resume file as they come, and a name that is ok there is not run again.
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
from edgeprune.io import save, write_bytes
from edgeprune.onnx_graph.graph import INLINE_BYTES, load_graph, static_or_raise, weights_of
from edgeprune.onnx_graph.passes import OPSET
from edgeprune.pipeline.export import export_model
from edgeprune.records import Schedule, Vit
from edgeprune.runtimes.target import target_for
from edgeprune.vit.families import family_of
from edgeprune.vit.fidelity import pruned_module
from edgeprune.vit.models import load_model

METHOD = "fold"
KEPT = (0.7, 0.5, 0.35)  # of all tokens, after a cut at a quarter, half and three quarters of the depth
NOISE = 0.02  # of the parameters' noise, as wide as timm's initial weights
TOLERANCE = 1e-3  # largest difference of logits in units of their standard deviation
COPIES = 2  # of its weights that a child holds at once: the module and its ONNX
SPARE_BYTES = 1 << 30  # of memory that is left to others
MODULES = ("vision_transformer", "deit", "eva")  # of timm
PACKAGES = ("timm", "torch", "onnx", "onnxruntime")
Row = dict[str, Any]


def names() -> list[str]:
    """What timm registers in the modules of VisionTransformer and Eva, without deprecated names."""
    return sorted({name for module in MODULES for name in timm.list_models(module=module)})


def surveyed(name: str) -> Row:
    """Parameters, an architecture's fingerprint, and why it is refused; without memory for weights.

    The fingerprint covers every module's type and settings and every tensor's shape: equal ones compute the same.
    """
    with torch.device("meta"):
        module = timm.create_model(name)
    digest = hashlib.sha256()
    for key, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if k[0] != "_" and k not in ("pretrained_cfg", "default_cfg")}
        text = f"{key} {type(part)} {part.extra_repr()} {sorted(settings.items(), key=str)}"
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


def tried(name: str, folder: Path) -> Row:
    """Create, export into `folder`, run, compare one model. Raises EdgepruneError and whatever a library raises."""
    torch.manual_seed(0)
    model = load_model(name, "random")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)
    vit, schedule = model.vit, folding(model.vit)
    image = np.random.default_rng(0).standard_normal((1, 3, *vit.size), dtype=np.float32)
    with torch.inference_mode():
        module = pruned_module(model, schedule.method, schedule.tokens, schedule.prefix_last)
        wanted = module(torch.from_numpy(image)).numpy()
    save(schedule, folder / "schedule.json")
    path = export_model(model, folder / "schedule.json", 1, folder / "model.onnx")
    del model, module
    gc.collect()
    graph = load_graph(path)
    static_or_raise(graph)
    assert [(o.domain, o.version) for o in graph.opset_import if o.domain in ("", "ai.onnx")] == [("", OPSET)]
    onnx.checker.check_model(os.fspath(path))
    with target_for("cpu").opener(path)() as session:
        found = session.infer(image)
    outside = sum(file.stat().st_size for file in weights_of(path))
    scale = float(wanted.std())
    worst = float(np.abs(wanted - found).max()) / scale
    row: Row = {"tokens": vit.tokens, "kept": [schedule.tokens[cut] for cut in schedule.cuts], "cuts": schedule.cuts}
    row |= {"prefix_last": schedule.prefix_last, "difference": worst, "scale": scale, "outside_bytes": outside}
    ok = np.isfinite(worst) and scale > 0 and worst <= TOLERANCE
    return row | {"ok": bool(ok), "reason": "" if ok else f"logits differ by {worst:.1e} of their deviation"}


def child(name: str, memory_bytes: int, limit_s: float) -> Row:
    """`tried` in a process of its own, ended where it takes more memory or time than allowed."""
    begin = time.monotonic()
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    folder = tempfile.TemporaryDirectory()  # goes with the model, however it ends
    process = context.Process(target=_run_model, args=(name, Path(folder.name), sender))
    process.start()
    sender.close()
    row: Row = {"ok": False, "reason": ""}
    while process.is_alive() and not receiver.poll(0.5):
        if _kib(f"/proc/{process.pid}/status", "RssAnon") * 1024 > memory_bytes:
            row |= {"tried": False, "reason": f"not tried here: more than {memory_bytes / 2**30:.0f} GiB of memory"}
        elif _kib("/proc/meminfo", "MemAvailable") << 10 < SPARE_BYTES:
            row |= {"tried": False, "reason": "not tried here: memory ran short"}
        elif time.monotonic() - begin > limit_s:
            row |= {"tried": False, "reason": f"not tried here: more than {limit_s / 60:.0f} minutes"}
        if row["reason"]:
            process.kill()
    try:
        row |= {} if row["reason"] else receiver.recv()
    except EOFError:
        row["reason"] = f"ended with {process.exitcode}"
    process.join()
    folder.cleanup()
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def _kib(file: str, key: str) -> int:
    """A figure of Linux's /proc, kB (RssAnon: what the system cannot take back); 0 once a process has ended."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path(file).read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _run_model(name: str, folder: Path, sender: Connection) -> None:
    """The child's own: what came of a model, sent to the parent."""
    try:
        row = tried(name, folder)
    except Exception as error:  # whatever a library raises is the model's reason
        row = {"ok": False, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sender.send(row | {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)})


def results(rows: list[Row], wanted: str, kept: Path, memory_bytes: int, limit_s: float) -> list[Row]:
    """A result for every survey row, small models first: refused, shared, known from the file, or from a child."""
    known = {row["name"]: row for row in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    first: dict[str, str] = {}
    done: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: (r["parameters"], r["name"])):
        name, twin = row["name"], first.setdefault(row["fingerprint"], row["name"])
        selected = any(fnmatch.fnmatch(name, pattern) for pattern in wanted.split(","))
        gib = 4 * row["parameters"] / 2**30
        if row["refused"]:
            found = {"ok": False, "refused": True, "reason": row["refused"]}
        elif twin != name:
            found = {**done[twin], "same_as": twin}
        elif name in known and (known[name]["ok"] or not selected):
            found = known[name]
        elif COPIES * gib * 2**30 > memory_bytes:
            found = {
                "ok": False,
                "tried": False,
                "reason": f"not tried here: needs memory for {COPIES} copies of {gib:.1f} GiB of weights",
            }
        elif not selected:
            found = {"ok": False, "tried": False, "reason": "not tried yet: left out by --only"}
        else:
            found = child(name, memory_bytes, limit_s) | {"name": name}
            if found.get("tried", True):
                with open(kept, "a") as file:
                    file.write(json.dumps(found) + "\n")
            outcome = found["reason"] or f"ok {found['difference']:.1e}"
            print(f"{name}: {outcome} ({found['seconds']:.0f} s, {found.get('peak_gib', 0)} GiB)", file=sys.stderr)
        done[name] = found | {"name": name, "parameters": row["parameters"]}
    return list(done.values())


def summary(rows: list[Row]) -> Row:
    """How many names are supported, tried and ok; supported is what no feature of its architecture refuses."""
    refused = [row for row in rows if row.get("refused")]
    untried = [row["name"] for row in rows if not row.get("tried", True)]
    ok = sum(row["ok"] for row in rows)
    supported = len(rows) - len(refused)
    total: Row = {"names": len(rows), "supported": supported, "ok": ok, "share": ok / supported if supported else 0.0}
    total |= {"share_of_tried": ok / max(supported - len(untried), 1), "not_tried": untried}
    return total | {"failed": [r["name"] for r in rows if not r["ok"] and r not in refused and r.get("tried", True)]}


def page(rows: list[Row], command: str) -> str:
    """The Markdown of docs/models.md."""
    total = summary(rows)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    shares = ", ".join(f"{share:.0%}" for share in KEPT)
    lines = [
        "# Models",
        "",
        f"**{total['ok']} of {total['supported']} supported names work ({total['share']:.1%})**, "
        f"{total['share_of_tried']:.1%} of those that were tried; "
        f"{len(total['failed'])} fail, {len(total['not_tried'])} were not tried. Largest difference: "
        f"{max(row.get('difference', 0.0) for row in rows):.1e}.",
        f"timm registers {total['names']} names in its modules {', '.join(MODULES)}. edgeprune refuses "
        f"{total['names'] - total['supported']} of them",
        "and says why: their blocks are not attention followed by an MLP, or their patches are not square.",
        "",
        f"Each model has random weights with added normal noise of {NOISE}, and a {METHOD} schedule: "
        "cuts at a quarter,",
        f"half and three quarters of the depth, to {shares} of the tokens. p: the last block computes only the",
        "prefix. The export is that of `edgeprune export --schedule`, fp32, batch 1. ok means: "
        "every shape is static,",
        f"the opset is {OPSET}, onnx's checker passes, and ONNX Runtime's logits on one random image differ from",
        f"PyTorch's by at most {TOLERANCE} of their standard deviation (the column gives that share).",
        f"Weights above {INLINE_BYTES >> 30} GiB are in a file next to the ONNX. "
        "Names with the same modules, settings and",
        "shapes share one result. A name that was ok is not run again: its result may come from an earlier version",
        "of edgeprune or a machine with more memory.",
        "",
        f"`{command}` with {versions}.",
        "",
        "| model | parameters, M | tokens | cuts in blocks | largest difference | result |",
        "| --- | ---: | --- | --- | ---: | --- |",
    ]
    for row in sorted(rows, key=lambda r: (bool(r.get("refused")), r["parameters"], r["name"])):
        tokens, cuts, difference = "", "", f"{row['difference']:.1e}" if "difference" in row else ""
        if "cuts" in row:
            tokens = " → ".join(str(n) for n in (row["tokens"], *row["kept"]))
            cuts = ", ".join(map(str, row["cuts"])) + (" p" if row["prefix_last"] else "")
        result = "ok" if row["ok"] else row["reason"]
        result += ", weights outside" if row.get("outside_bytes") else ""
        result += f", same as {row['same_as']}" if "same_as" in row else ""
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.1f} | {tokens} | {cuts} | {difference} | {result} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Survey, try, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="names to try, as patterns with commas between; all are listed")
    parser.add_argument("--resume", type=Path, default=Path("models.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--memory-gib", type=float, default=10)
    parser.add_argument("--minutes", type=float, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [surveyed(name) for name in names()]
    with tempfile.TemporaryDirectory() as folder:  # what an export imports and registers, children need not
        export_model(load_model("test_vit", "random"), None, 1, Path(folder) / "warm.onnx")
    found = results(rows, args.only, args.resume, int(args.memory_gib * 2**30), args.minutes * 60)
    write_bytes(args.out, page(found, f"python benchmarks/models.py --memory-gib {args.memory_gib:g}").encode())
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
