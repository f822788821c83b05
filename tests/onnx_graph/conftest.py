"""The graph that conversions are tested on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import onnx
import pytest


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], onnx.ModelProto]:
    """model(method) is the tiny model with cuts in blocks 0 and 1 at batch 2, as fp32 ONNX."""

    @cache
    def made(method: str) -> bytes:
        import torch

        from edgeprune.vit import export
        from edgeprune.vit.pruned import PrunedViT
        from edgeprune.vit.reducers import reducer_named

        found, path = tiny("cls"), tmp_path_factory.mktemp("fp32") / "model.onnx"
        module = PrunedViT(found.module, found.family, found.vit, (13, 9, 9), reducer_named(method), True)
        export.onnx_from_module(module, torch.zeros(2, 3, 16, 16), path)
        return path.read_bytes()

    return lambda method: onnx.load_from_string(made(method))
