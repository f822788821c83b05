"""Fake quantisation: linear layers as INT8 rounds them, in floating point, so that weights can be tuned with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from edgeprune.errors import REPORT, ExportError
from edgeprune.io import sha256_bytes
from edgeprune.onnx_graph.int8 import LARGEST, Int8Layer


class FakeInt8(TorchFunctionMode):
    """Within it, one forward pass computes linear layers with the rounding of onnx_graph/int8.py.

    `layers` are those of the ONNX file in order. In the first pass they are found by their weights among what PyTorch
    calls; what is not in the file has a constant result there. Gradients pass straight through the rounding
    (arXiv 1308.3432), except where an activation is beyond its range. Raises ExportError where a layer is not found.
    """

    def __init__(self, layers: Sequence[Int8Layer]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.limits: list[float | None] = []  # by call of the first pass
        self.calls = self.found = 0

    def __enter__(self) -> FakeInt8:
        self.calls = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is None and self.found != len(self.layers):
            raise ExportError(f"INT8: linear layer {self.found + 1} of the ONNX file is not in the model: {REPORT}")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear:
            return func(*self.rounded(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def rounded(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        """The arguments of a linear layer, input (..., in), weight (out, in), rounded where the file has INT8."""
        if self.calls == len(self.limits):
            self.limits.append(self.limit_of(weight))
        limit = self.limits[self.calls]
        self.calls += 1
        if limit is None:
            return input, weight, bias
        x = torch.fake_quantize_per_tensor_affine(input.float(), limit / LARGEST, 0, -LARGEST - 1, LARGEST)
        largest = weight.detach().abs().amax(dim=1)
        scales = torch.where(largest > 0, largest, 1.0) / LARGEST
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        return x, torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -LARGEST, LARGEST), bias

    def limit_of(self, weight: Tensor) -> float | None:
        """The range of the input of a layer (out, in), if it is the file's next one."""
        digest = sha256_bytes(weight.detach().cpu().t().contiguous().numpy().tobytes())
        if self.found == len(self.layers) or self.layers[self.found].weights != digest:
            return None
        self.found += 1
        return self.layers[self.found - 1].limit
