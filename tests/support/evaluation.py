"""An evaluation of the embedded model, by hand: it shares no code with edgeprune."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image

from edgeprune import zoo

DENSE = (197,) * 12


def labelled(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of a CSV as the embedded model takes them, (images, 3, 28, 28) fp32, and their labels."""
    pictures, labels = [], []
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            pixels = np.array(Image.open(source.parent / row["image"]).convert("RGB"), np.float32)
            pictures.append((pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
            labels.append(int(row["label"]))
    return np.stack(pictures).transpose(0, 3, 1, 2), np.array(labels)


def logits_of(model: Path, pictures: np.ndarray) -> np.ndarray:
    """Outputs of an ONNX file over pictures, batch by batch, the last batch filled up with zeros."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    size, rows = entry.shape[0], []
    for start in range(0, len(pictures), size):
        piece = np.zeros(entry.shape, np.float32)
        part = pictures[start : start + size]
        piece[: len(part)] = part
        rows.append(session.run(None, {entry.name: piece})[0][: len(part)])
    return np.concatenate(rows)


@functools.cache
def dense_logits(source: Path, depth: int = 12) -> np.ndarray:
    """Outputs of the unpruned embedded model, or its first blocks, in plain timm over the pictures of a CSV."""
    import torch
    from safetensors.torch import load_file

    model = zoo.vit_digits()
    model.load_state_dict(load_file(zoo.WEIGHTS), strict=True)
    model.blocks = model.blocks[:depth]
    pictures, _ = labelled(source)
    with torch.inference_mode():
        return torch.cat([model(part) for part in torch.from_numpy(pictures).split(50)]).numpy()


def normalised_tokens(model: Path) -> list[int]:
    """Token counts that the LayerNormalizations of an ONNX file put out, in order."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(model)), strict_mode=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    return [shapes[node.output[0]][1] for node in graph.node if node.op_type == "LayerNormalization"]


def expected_tokens(tokens: list[int], prefix_last: bool) -> list[int]:
    """What two norms per block (before attention, before the MLP) and the last norm put out."""
    counts, entering = [], DENSE[0]
    for leaving in tokens:
        counts += [entering, leaving]
        entering = leaving
    counts.append(entering)
    return [*counts[:-2], 1, 1] if prefix_last else counts  # a last block for the CLS token alone
