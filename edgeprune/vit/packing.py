"""A model as bytes and arrays, so that processes of one machine can share the memory of its weights."""

from __future__ import annotations

import io
import pickle
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Packed(NamedTuple):
    """A model without its tensors, and their values in the order in which it refers to them."""

    skeleton: bytes
    arrays: list[NDArray[Any]]


class _Unpickler(pickle.Unpickler):
    """Puts the tensors in, without a copy."""

    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.skeleton))
        self.arrays = packed.arrays
        self.tensors: dict[int, torch.Tensor] = {}

    def persistent_load(self, place: Any) -> torch.Tensor:
        number, is_parameter = place
        if number not in self.tensors:
            with warnings.catch_warnings():  # the array may be read-only: an evaluation never writes to weights
                warnings.simplefilter("ignore")
                tensor = torch.from_numpy(self.arrays[number])
            if tensor.data_ptr() % 64:  # as PyTorch's own are; kernels may round differently where they are not
                tensor = tensor.clone()
            self.tensors[number] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return self.tensors[number]


def packed(model: Any, pickler: type[pickle.Pickler]) -> Packed:
    """A Model or PrunedViT for `unpacked`, which has to run the same versions of timm and PyTorch.

    `pickler` is that of cloudpickle, which takes classes of `__main__` along. Tensors are left out; those that are
    one object stay one.
    """
    arrays: list[NDArray[Any]] = []
    places: dict[int, tuple[int, bool]] = {}

    class WithoutTensors(pickler):  # type: ignore[valid-type, misc]
        def persistent_id(self, thing: Any) -> tuple[int, bool] | None:
            if not isinstance(thing, torch.Tensor):
                return None
            if id(thing) not in places:
                places[id(thing)] = len(arrays), isinstance(thing, nn.Parameter)
                arrays.append(thing.detach().cpu().contiguous().numpy())
            return places[id(thing)]

    file = io.BytesIO()
    WithoutTensors(file).dump(model)
    return Packed(file.getvalue(), arrays)


def unpacked(packed: Packed) -> Any:
    """The model; its weights are the memory of `packed.arrays`."""
    return _Unpickler(packed).load()
