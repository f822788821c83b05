"""The files that the judges are given, made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
from support.trt_files import networks


@pytest.fixture(scope="session")
def network(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., onnx.ModelProto]:
    """network(method, prefix_last, batch, precision) is the tiny model as TensorRT gets it."""
    return networks(tiny("cls"), tmp_path_factory.mktemp("methods"))
