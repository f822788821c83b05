"""A bundle of one matrix product for benches, and stored results that are slower or faster."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeprune.bundles.format import write_bundle
from edgeprune.records import Engine, Latency, Preprocessing, Report, Schedule, Setup, Vit

SHAPE, CLASSES = (2, 3, 4, 4), 7  # images of the toy, batch first


FLOPS = 2 * 2 * 48 * CLASSES  # two for each multiply-add of (2, 48) · (48, 7)


def toy_onnx(path: Path, operator: str = "MatMul") -> Path:
    """(2, 3, 4, 4) images to (2, 7): one matrix product and one product elementwise, which does not count."""
    weights = {"w": np.ones((48, CLASSES), np.float32), "s": np.array([2, 48]), "half": np.float32(0.5)}
    nodes = [
        helper.make_node("Mul", ["images", "half"], ["x"]),
        helper.make_node("Reshape", ["x", "s"], ["flat"]),
        helper.make_node(
            operator, ["flat", "w"], ["y"], **({"equation": "ij,jk->ik"} if operator == "Einsum" else {})
        ),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("images", SHAPE), ("y", (2, CLASSES)))
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "toy", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def toy_bundle(out: Path, operator: str = "MatMul", **setup: Any) -> Path:
    """A bundle of the toy for this CPU, unless `setup` says otherwise."""
    file = toy_onnx(out.with_suffix(".onnx"), operator)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    fields = {
        "device": "cpu",
        "machine": "another",
        "runtime": "ort-cpu",
        "runtime_version": "0",
        "precision": "fp32",
    }
    vit = Vit(
        name="toy", weights_sha256="0" * 64, family="vit", image_px=4, patch_px=2, depth=2, width=8, heads=2,
        head_dim=4, mlp_width=16, prefix=1, tokens=5, classes=CLASSES, prefix_pooled=True,
    )  # fmt: skip
    how = Preprocessing(
        image_px=4, resize_px=4, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    name = setup.pop("engine", "model.onnx")
    engine = Engine(
        path=name, sha256=digest, onnx_sha256=digest, size_bytes=1, setup=Setup(**{**fields, "batch": 2} | setup)
    )
    latency = Latency(samples_ms=(1.0,))
    write_bundle(
        out, vit=vit, files={name: file, "model.onnx": file}, engine=engine,
        schedule=Schedule(vit=vit, method="topk", policy="search", tokens=(5, 3)), staircase=None,
        report=Report(latency=latency, dense_latency=latency, speedup=1.0, speedup_interval=(1.0, 1.0)),
        preprocessing=how, labels=tuple("abcdefg"),
        golden=(np.zeros(SHAPE, np.float32), np.zeros((2, CLASSES), np.float32)),
    )  # fmt: skip
    return out


def scaled(result: dict[str, Any], factor: float, machine: float = 1.0) -> dict[str, Any]:
    """A bench in which bundles took `factor` times as long, and the matrix products `machine` times."""
    changed: dict[str, Any] = json.loads(json.dumps(result))
    for row in changed["rows"]:
        row["samples_ms"] = [ms * factor for ms in row["samples_ms"]]
    for probe in changed["probes"]:
        probe["samples_ms"] = [ms * machine for ms in probe["samples_ms"]]
    return changed
