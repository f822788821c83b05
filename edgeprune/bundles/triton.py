"""A bundle as an entry of a Triton model repository: the engine, its configuration and its labels."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from edgeprune.bundles.format import ONNX, check_engine, load_bundle
from edgeprune.errors import InputError
from edgeprune.io import writable
from edgeprune.onnx_graph.graph import load_graph, weights_of
from edgeprune.records import Output

# Triton Inference Server, "Model Configuration": backend names and the file that each loads by default.
BACKENDS = {".engine": ("tensorrt", "model.plan"), ".onnx": ("onnxruntime", "model.onnx")}


def triton_entry(bundle: Path, repository: Path, name: str | None = None) -> Path:
    """Write `repository`/NAME/{config.pbtxt, labels.txt, 1/model.plan or model.onnx}, completely or not at all.

    A model without classes has no labels.txt. An engine runs as a CUDA graph, as it does where it is timed.
    The batch is part of the static shapes, so `max_batch_size` is 0 and it is the first of dims. Returns the folder.
    Raises InputError for a simulated bundle and where the entry exists already, OutputError.
    """
    manifest = load_bundle(bundle)
    setup, vit, engine = manifest.engine.setup, manifest.vit, bundle / manifest.engine.path
    check_engine(bundle, setup)
    name = name or f"{vit.name}-{manifest.schedule.method}-{setup.precision}-b{setup.batch}"
    if Path(name).name != name or name.startswith("."):
        raise InputError(f"{name!r} cannot be the name of a model: use letters, digits, - and _")
    out = repository / name
    if out.exists():
        raise InputError(f"{out} exists already: choose another --name, or remove it")
    backend, file = BACKENDS[engine.suffix]
    graph = load_graph(bundle / ONNX).graph
    inputs = _tensor("input", graph.input[0].name, (setup.batch, 3, *vit.size))
    named = 'label_filename: "labels.txt"' if manifest.labels else ""
    shapes = vit.outputs or (Output(graph.output[0].name, (vit.classes,)),)
    outputs = "".join(_tensor("output", name, (setup.batch, *shape), named) for name, shape in shapes)
    graphs = "optimization { cuda { graphs: true } }\n" if engine.suffix == ".engine" else ""
    kind = "KIND_CPU" if setup.runtime == "ort-cpu" else "KIND_GPU"
    config = (
        f"name: {json.dumps(name)}\nbackend: {json.dumps(backend)}\nmax_batch_size: 0\n"
        f"{inputs}{outputs}instance_group [ {{ kind: {kind} count: 1 }} ]\n{graphs}"
    )
    labels = "".join(" ".join(label.split()) + "\n" for label in manifest.labels)
    with writable(out):
        repository.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=repository, prefix=f".{name}.", suffix=".tmp"))
        try:
            (fresh / "1").mkdir()
            shutil.copyfile(engine, fresh / "1" / file)
            for weights in weights_of(bundle / ONNX) if engine.suffix == ".onnx" else ():
                shutil.copyfile(weights, fresh / "1" / weights.name)
            (fresh / "config.pbtxt").write_text(config, encoding="utf-8")
            if manifest.labels:
                (fresh / "labels.txt").write_text(labels, encoding="utf-8")
            os.chmod(fresh, 0o755)
            os.rename(fresh, out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return out


def _tensor(kind: str, name: str, dims: tuple[int, ...], more: str = "") -> str:
    """One tensor in the text format of protobuf, which takes JSON's strings."""
    return f"{kind} [ {{ name: {json.dumps(name)} data_type: TYPE_FP32 dims: {list(dims)} {more} }} ]\n"
