"""What was prepared for a machine without torch: fp32 graphs that share one file of weights, pictures, logits.

KIT/MODEL/ holds graphs, `weights.bin` with every large tensor once, and `weights.json` about it. A model with random
weights travels without them: they are drawn here, since latency does not depend on them. Conversion to fp16 and INT8
needs no torch either and happens here, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.utils

from edgeprune.io import code_key, load, replacing
from edgeprune.onnx_graph.fp16 import fp16
from edgeprune.onnx_graph.graph import fix_tokens, infer, save_apart, save_graph
from edgeprune.onnx_graph.int8 import int8
from edgeprune.onnx_graph.islands import islands
from edgeprune.onnx_graph.passes import raise_opset
from edgeprune.onnx_graph.precision import CONVERSIONS, QUANTISED
from edgeprune.records import Int8Ranges, Vit

if TYPE_CHECKING:
    from numpy.typing import NDArray

STORE, ABOUT = "weights.bin", "weights.json"
SPREAD = 0.02  # standard deviation of random weights, as timm draws them
PIECE = 1 << 22  # values drawn at a time
PARITY, LATENCY = "parity", "latency"  # what a model of the kit is for


def int8_with_fp16_scales(
    model: onnx.ModelProto, ranges: Mapping[str, float] | None = None, kept: Sequence[str] = ()
) -> onnx.ModelProto:
    """INT8 linear layers in fp16 with fp16 scales, no cast after DQ; opset 19, which TensorRT 8.6 cannot read."""
    return fp16(raise_opset(int8(model, ranges, kept, fp32_weights=True)), islands(model))


# What step 7 compares with the form that edgeprune exports, int8-fp16. On an Orin it may fail to build, a known issue
# of TensorRT (NVIDIA/TensorRT#4832).
FP16_SCALES = "int8-fp16-scales"
FORMS: dict[str, Callable[..., onnx.ModelProto]] = {**QUANTISED, FP16_SCALES: int8_with_fp16_scales}


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def models_for(kit: Path, use: str) -> Iterator[Path]:
    """The folders of models that are for `use`, in alphabetical order."""
    for about in sorted(kit.glob(f"*/{ABOUT}")):
        if use in read_json(about)["uses"]:
            yield about.parent


def vit_of(folder: Path) -> Vit:
    """The shape of a model. Raises RecordError."""
    return load(folder / "vit.json", Vit)


def variant(method: str, prefix_last: bool, batch: int) -> str:
    """The name of a graph for parity; with batch 0 the name of its logits, which hold for every batch."""
    return f"{method}-{'prefix' if prefix_last else 'whole'}-b{batch}"


def pruned(method: str, percent: int, batch: int) -> str:
    """The name of a graph for latency: one cut to so many percent of the tokens."""
    return f"{method}-r{percent}-b{batch}"


def weights_key(folder: Path) -> str:
    """What tells these weights from others; they are drawn first where they did not travel. Raises OutputError."""
    about = read_json(folder / ABOUT)
    if about["random"] and not (folder / STORE).exists():
        rng, left = np.random.default_rng(0), about["bytes"] // 4
        with replacing(folder / STORE) as temporary, open(temporary, "wb") as file:
            while left:
                count = min(left, PIECE)
                file.write((SPREAD * rng.standard_normal(count, dtype=np.float32)).tobytes())
                left -= count
    return str(about["key"])


def onnx_in(folder: Path, name: str, kind: str, work: Path) -> Path:
    """A graph of a model in a precision of ONNX files or a form (FORMS), converted once. Raises OutputError."""
    source = folder / f"{name}.onnx"
    key = weights_key(folder)
    out = work / "onnx" / f"{folder.name}-{key[:12]}-{code_key()[:12]}" / f"{name}-{kind}.onnx"
    if not out.exists():
        model = onnx.load(source)
        ranges = folder / f"{name}.int8.json"
        if kind in FORMS:
            found = load(ranges, Int8Ranges) if ranges.exists() else None
            model = FORMS[kind](model, found.ranges, found.kept) if found else FORMS[kind](model)
        elif kind in CONVERSIONS:
            model = CONVERSIONS[kind](model)
        _save(model, out)
    return out


def _save(model: onnx.ModelProto, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    if all(dim.HasField("dim_value") for dim in dims):
        save_graph(model, out)
    else:  # a trunk or block, whose static versions share its weights
        save_apart(model, out, out.with_suffix(".weights"))


def static_onnx(folder: Path, name: str, kind: str, tokens: int, work: Path) -> Path:
    """A block with its token axis fixed. Raises ExportError, InputError, OutputError."""
    whole = onnx_in(folder, name, kind, work)
    out = whole.with_name(f"{whole.stem}-{tokens}.onnx")
    if not out.exists():
        fix_tokens(whole, tokens, out)
    return out


def ranking_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """The part of a pruned model up to the order in which its first cut ranks tokens, (B, tokens) indices."""
    infer(model)
    order = next(node.output[1] for node in model.graph.node if node.op_type == "TopK")
    return onnx.utils.Extractor(model).extract_model(["images"], [order])


def chosen(method: str, entering: int, leaving: int, prefix: int) -> int:
    """How many of the ranked tokens the first cut of a method treats differently from the rest.

    They are those that it keeps (fold counts the prefix among them; evit and pomt leave one token for the others), or
    for tome those that its first round merges.
    """
    if method == "tome":
        return min(entering - leaving, (entering - prefix) // 2)
    return {"fold": leaving, "topk": leaving - prefix}.get(method, leaving - prefix - 1)


def overlap(found: NDArray[Any], wanted: NDArray[Any], count: int) -> float:
    """Mean share of the first `count` indices of each row (images, tokens) that two rankings have in common."""
    pairs = zip(found[:, :count].astype(int), wanted[:, :count].astype(int), strict=True)
    return float(np.mean([len({*a} & {*b}) / count for a, b in pairs]))


def in_batches(pictures: NDArray[np.float32], batch: int) -> Sequence[NDArray[np.float32]]:
    """Whole batches; the number of pictures of a kit is a multiple of every batch for parity."""
    return np.split(pictures, len(pictures) // batch)
