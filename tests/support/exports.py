"""Exports that all test processes share: a graph that one of them has traced is not traced again by another."""

from __future__ import annotations

import hashlib
import os
import pickle
import types
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import onnx

from edgeprune.onnx_graph import graph

FOLDER = "EDGEPRUNE_TEST_EXPORTS"  # variable of the environment that names the folder of the shared exports


class _Content(pickle.Pickler):
    """Pickles a module by what its export depends on: structure, settings, and tensors by their content."""

    def reducer_override(self, thing: Any) -> Any:
        import torch

        if isinstance(thing, torch.Tensor):
            content = hashlib.sha256(thing.detach().contiguous().numpy().tobytes()).hexdigest()
            return str, (f"{content} {thing.dtype} {tuple(thing.shape)}",)
        return (str, (thing.__name__,)) if isinstance(thing, types.ModuleType) else NotImplemented


def _key(*parts: Any) -> str:
    content = BytesIO()
    _Content(content).dump(parts)
    return hashlib.sha256(content.getvalue()).hexdigest()


def share() -> None:
    """Make this process use the shared exports, if there is a folder for them."""
    folder = os.environ.get(FOLDER)
    if folder:
        from edgeprune.vit import export

        mock.patch.object(export, "traced", _shared(export.traced, Path(folder))).start()


def _shared(traced: Callable[..., onnx.ModelProto], folder: Path) -> Callable[..., onnx.ModelProto]:
    def wrapped(module: Any, example: Any, names: tuple[str, str], axis: int | None, place: Path) -> onnx.ModelProto:
        try:
            key = _key(module, example, names, axis, graph.INLINE_BYTES)
        except (pickle.PicklingError, AttributeError, TypeError):  # a module of a test's own
            return traced(module, example, names, axis, place)
        file = folder / f"{key}.onnx"
        if file.is_file():
            return onnx.load(file)
        model = traced(module, example, names, axis, place)
        if not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
            half = file.with_suffix(f".{os.getpid()}")
            half.write_bytes(model.SerializeToString())
            half.replace(file)
        return model

    return wrapped
