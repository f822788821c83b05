"""NVIDIA's parser and compiler of the 10 and 11 line take every kind of file, and refuse what they should.

TensorRT-RTX builds on a CPU. Skipped by name where there is no wheel of it: requirements-dev.txt says where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from gpu_steps.kit import int8_with_fp16_scales
from onnx import TensorProto
from support.trt_files import PRECISIONS, controls, converted, every, topk

from edgeprune.errors import ExportError
from edgeprune.latency.depth import LEAST_BLOCKS
from edgeprune.onnx_graph.graph import MOST_SORTED, fix_tokens, onnx_precision_of, sorts_or_raise
from edgeprune.onnx_graph.precision import CONVERSIONS, QUANTISED

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has no wheel for this Python or machine")

from support.trt_rtx import judge


def accepted(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """The verdict on a model that has to be taken, built, and warned of in no way but the known one."""
    onnx.save(model, path)
    found = judge(path)
    assert found["parsed"] and found["built"], (found["errors"], found["log"])
    assert found["plan_bytes"] > 1000
    assert not [text for text in found["log"] if "ubnormal" in text or "verflow" in text], found["log"]
    return found


@every()
def test_every_file_is_built(
    method: str, prefix_last: bool, batch: int, precision: str,
    network: Callable[..., onnx.ModelProto], tmp_path: Path,
) -> None:  # fmt: skip
    """With the types and the shapes that the ONNX says, in the number of layers that it has."""
    model = network(method, prefix_last, batch, precision)
    found = accepted(model, tmp_path / "model.onnx")
    assert [(kind, shape) for _, kind, shape in found["inputs"]] == [("FLOAT", (batch, 3, 16, 16))]
    assert [(kind, shape) for _, kind, shape in found["outputs"]] == [("FLOAT", (batch, 7))]
    wanted, kinds = Counter(node.op_type for node in model.graph.node), Counter(row[1] for row in found["layers"])
    assert kinds["TOPK"] == wanted["TopK"] + wanted["ArgMax"] and kinds["SOFTMAX"] == wanted["Softmax"]
    assert kinds["NORMALIZATION"] == wanted["LayerNormalization"]
    assert kinds["QUANTIZE"] == wanted["QuantizeLinear"] and kinds["DEQUANTIZE"] == wanted["DequantizeLinear"]
    assert (kinds["QUANTIZE"] > 0) is (precision in QUANTISED)
    elements = {"FLOAT": TensorProto.FLOAT, "HALF": TensorProto.FLOAT16, "INT8": TensorProto.INT8}
    elements["FP8"] = TensorProto.FLOAT8E4M3FN
    values = {v.name: v.type.tensor_type for v in (*model.graph.value_info, *model.graph.output)}
    compared = 0
    for _, _, outputs in found["layers"]:
        for name, kind, shape in outputs:
            if name in values and kind in elements:
                assert values[name].elem_type == elements[kind], name
                assert tuple(dim.dim_value for dim in values[name].shape.dim) == shape, name
                compared += 1
    assert compared > 50
    if precision != "fp32":
        softmax = [out[0][1] for _, kind, out in found["layers"] if kind == "SOFTMAX"]
        assert softmax[-1] == "HALF", "the attention of the last block is in fp16, or it would not fuse"
        assert {out[0][1] for _, kind, out in found["layers"] if kind == "NORMALIZATION"} == {"FLOAT"}


@pytest.fixture(scope="module")
def profiled(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """profiled(kind, precision) is a folder as `export --trunk` writes it; a graph is traced once for all of them."""
    from edgeprune.vit.profiling_models import export_profiling_models

    @cache
    def made(kind: str, precision: str) -> Path:
        folder = tmp_path_factory.mktemp("profiled")
        export_profiling_models(tiny(kind, LEAST_BLOCKS), ("fold",), 2, folder, precision, tensorrt=True)
        return folder

    return made


@pytest.mark.parametrize(
    ("kind", "precision"), [("cls", "fp16"), ("cls", "int8-fp16"), ("cls", "fp8"), ("eva02", "int8-fp16")]
)
def test_profiling_models_are_built(
    kind: str, precision: str, profiled: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Those with a symbolic token axis at 6 tokens: every count is the same file with one dimension changed."""
    files = {path.stem: path for path in profiled(kind, precision).glob("*.onnx")}
    assert {*files} >= {"trunk", "pair", "block", "fixed", "dense", *({"last"} if kind == "cls" else ())}
    assert sum(name.startswith("cut-fold-") for name in files) == 2
    for name, path in files.items():
        count = 6 if name in ("trunk", "pair", "block", "last") else None
        if count is not None:
            fix_tokens(path, count, path := path.with_name(f"{name}-{count}.onnx"))
        found = judge(path)
        assert found["parsed"] and found["built"], (name, found["errors"], found["log"])
        entering = (2, 3, 16, 16) if name in ("fixed", "dense") else (2, count or int(name.split("-")[2]), 48)
        assert found["inputs"][0][1:] == ("FLOAT", entering)
        ends = {"fixed": (2, 7), "dense": (2, 7), "last": (2, 1, 48)}
        leaving = (2, count or int(name.split("-")[-1]), 48) if name not in ends else ends[name]
        assert found["outputs"][0][1:] == ("FLOAT", leaving)


def test_the_other_form_of_int8_is_built(network: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """What step 7 of benchmarks/gpu_run.py compares with ours."""
    found = accepted(int8_with_fp16_scales(network("fold", True, 1, "fp32")), tmp_path / "model.onnx")
    assert {out[0][1] for _, kind, out in found["layers"] if kind == "DEQUANTIZE"} == {"HALF"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_export_writes_is_built(precision: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """The file of onnx_of_schedule itself, as `export` and `build` call it."""
    from edgeprune.vit import export

    convert = CONVERSIONS.get(precision)
    export.onnx_of_schedule(tiny("cls"), "fold", (13, 9, 9), True, 1, tmp_path / "m.onnx", convert, tensorrt=True)
    found = judge(tmp_path / "m.onnx")
    assert found["parsed"] and found["built"], (found["errors"], found["log"])
    assert onnx_precision_of(onnx.load(tmp_path / "m.onnx")) == precision


@pytest.mark.parametrize("precision", ["fp16", "int8-fp16"])
def test_rms_norm_is_built_in_fp32(precision: str, tmp_path: Path) -> None:
    """From the squares to the product: between them nothing is fp16, which they would overflow."""
    import timm.layers
    from timm.models.vision_transformer import VisionTransformer

    from edgeprune.vit import export
    from edgeprune.vit.models import load_model

    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    net = VisionTransformer(num_classes=7, norm_layer=timm.layers.RmsNorm, qk_norm=True, **sizes)
    file = tmp_path / "fp32.onnx"
    export.onnx_of_schedule(load_model(net), "fold", (13, 13), True, 1, file, tensorrt=True)
    found = accepted(converted(onnx.load(file), precision), tmp_path / "model.onnx")
    roots = [out[0][1] for name, kind, out in found["layers"] if kind == "UNARY" and "sqrt" in name.lower()]
    assert len(roots) == 2 * (2 * 4 + 1) and {*roots} == {"FLOAT"}, "each of nine norms has a root and its reciprocal"


@pytest.mark.parametrize("control", controls())
def test_what_is_wrong_is_refused(control: str, tmp_path: Path) -> None:
    """So that being taken means something."""
    model, reason = controls()[control]
    onnx.save(model, tmp_path / "model.onnx")
    found = judge(tmp_path / "model.onnx")
    assert not (found["parsed"] and found["built"])
    assert reason in " ".join((*found["errors"], *found["log"])), (found["errors"], found["log"])


def test_the_limit_of_topk_is_ours(tmp_path: Path) -> None:
    """What export refuses is what TensorRT refuses, and nothing less."""
    accepted(topk(MOST_SORTED), tmp_path / "model.onnx")
    sorts_or_raise(topk(MOST_SORTED))
    with pytest.raises(ExportError, match="a cut sorts 3841 tokens, but TensorRT at most 3840: cut later"):
        sorts_or_raise(topk(MOST_SORTED + 1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dense_features_are_built(precision: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Several outputs, restored to the grid after one cut and after two."""
    from edgeprune.features import with_layers
    from edgeprune.vit import export

    model = tiny("cls")
    model = replace(model, vit=with_layers(model.vit, (1, 3)), task="dense")
    export.onnx_of_schedule(model, "fold", (13, 13, 9), False, 2, tmp_path / "dense.onnx", tensorrt=True)
    found = accepted(converted(onnx.load(tmp_path / "dense.onnx"), precision), tmp_path / "model.onnx")
    grid = ("FLOAT", (2, 4, 4, 48))
    wanted = {"features_1": grid, "features_3": grid, "embedding": ("FLOAT", (2, 7))}
    assert {name: (kind, shape) for name, kind, shape in found["outputs"]} == wanted
