"""Dense features: the outputs of several layers as one array, and the figures that compare them.

An engine with several outputs gives one array (images, values): each output flattened, in the order of Vit.outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgeprune.errors import InputError
from edgeprune.records import DenseFidelity, LayerFidelity, Output, Vit

if TYPE_CHECKING:
    from numpy.typing import NDArray

Head = Callable[[Mapping[str, "NDArray[np.float32]"]], "NDArray[np.float32]"]  # of outputs by name, to (images, …)
LEAST = 1e-12
AT_ONCE = 16  # pictures at a time: differences are as large as the features themselves


def with_layers(vit: Vit, layers: Sequence[int]) -> Vit:
    """The record of a model with patch features of `layers` as outputs. Raises InputError for one out of range."""
    if not layers:
        return vit
    if not 1 <= min(layers) <= max(layers) <= vit.depth:
        wrong = min(layers) if min(layers) < 1 else max(layers)
        raise InputError(f"layer {wrong} is out of range: pass --layers of the blocks 1 to {vit.depth} of {vit.name}")
    return msgspec.structs.replace(vit, layers=tuple(sorted(set(layers))), prefix_pooled=False)


def packed(outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Outputs of one batch as one fp32 array: a single one as it is, several flattened, (B, values).

    The order is that of Vit.outputs, whatever the order in the file: layers ascending, then the others by name.
    """
    if len(outputs) == 1:
        [only] = outputs.values()
        return np.asarray(only, np.float32)
    rows = [np.asarray(outputs[name], np.float32) for name in sorted(outputs, key=_place)]
    return np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1)


def _place(name: str) -> tuple[bool, int, str]:
    stem, _, number = name.rpartition("_")
    layer = stem == "features" and number.isdigit()
    return not layer, int(number) if layer else 0, name


def unpacked(array: NDArray[np.float32], outputs: Sequence[Output]) -> dict[str, NDArray[np.float32]]:
    """The outputs (images, *shape) of an array of `packed`, by name; views, not copies."""
    found, start = {}, 0
    for name, shape in outputs:
        size = Output(name, shape).size
        found[name] = array[:, start : start + size].reshape(len(array), *shape)
        start += size
    return found


class Dense:
    """Patch features on the full grid, and the output of a head on them if one is given.

    An error is relative: the length of the difference to the unpruned output over the length of that output, both
    of all pictures together, so that a picture with an empty map does not count for more than others.
    """

    name, output = "dense", "embedding"
    loss_name, loss_unit, top1_name, agreement_name = "squared relative error", "", "top-1", "agreement"
    sensitive, least_images = 0.0004, 1  # a relative error of 2 %

    def __init__(self, outputs: Sequence[Output] = (), head: Head | None = None) -> None:
        self.outputs, self.head = tuple(outputs), head
        self._known: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the outputs with patch features."""
        return [output.name for output in self.outputs[:-1]]

    def losses(self, dense: NDArray[np.float32], outputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """Squared error of the head's output, without a head the mean over layers; (images,).

        It is relative to the mean square over the pictures.
        """
        if self.head is not None:
            before, after = self.of_head(dense, True), self.of_head(outputs)
            one: NDArray[np.float64] = _squares(before, after) / max(_squares(before).mean(), LEAST)
            return one
        before_of, after_of = unpacked(dense, self.outputs), unpacked(outputs, self.outputs)
        each = [
            _squares(before_of[name], after_of[name]) / max(_squares(before_of[name]).mean(), LEAST)
            for name in self.layers
        ]
        mean: NDArray[np.float64] = np.mean(each, axis=0)
        return mean

    def off(self, found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.floating]:
        """Relative difference of each picture's outputs, of the output that differs most."""
        one, other = unpacked(found, self.outputs), unpacked(wanted, self.outputs)
        relative = [
            (_squares(other[name], one[name]) / np.maximum(_squares(other[name]), LEAST)) ** 0.5 for name in other
        ]
        most: NDArray[np.floating] = np.max(relative, axis=0)
        return most

    def fidelity(
        self, dense: NDArray[np.float32] | None, outputs: NDArray[np.float32], labels: Sequence[int] | None
    ) -> DenseFidelity:
        """All figures; labels have no meaning here."""
        if dense is None:
            return DenseFidelity()
        before, after = unpacked(dense, self.outputs), unpacked(outputs, self.outputs)
        head_error = head_difference = None
        if self.head is not None:
            one, other = self.of_head(dense, True), self.of_head(outputs)
            head_error = _error(one, other)
            head_difference = float(np.abs(other - one).mean(dtype=np.float64))
        layers = tuple(
            LayerFidelity(
                layer=int(name.rpartition("_")[2]),
                error=_error(before[name], after[name]),
                cosine=_cosine(before[name], after[name]),
            )
            for name in self.layers
        )
        return DenseFidelity(
            error=head_error if self.head else float(np.mean([each.error**2 for each in layers]) ** 0.5),
            layers=layers,
            embedding_cosine=_cosine(before["embedding"], after["embedding"]),
            head_error=head_error,
            head_difference=head_difference,
        )

    def of_head(self, outputs: NDArray[np.float32], keep: bool = False) -> NDArray[np.float32]:
        """The head's output, (images, …); with `keep` for later calls, which ask for the unpruned one again."""
        assert self.head is not None
        if self._known is not None and self._known[0] is outputs:
            return self._known[1]
        found = self.head(unpacked(outputs, self.outputs))
        if keep:
            self._known = (outputs, found)
        return found


def _squares(array: NDArray[np.float32], other: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
    """Sum of squares of each picture's values, or of their differences to another array; (images,)."""
    found = np.empty(len(array))
    for start in range(0, len(array), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        part = array[rows] if other is None else array[rows] - other[rows]
        flat = part.reshape(len(part), -1).astype(np.float64)
        found[rows] = np.einsum("iv,iv->i", flat, flat)
    return found


def _error(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    return float((_squares(before, after).sum() / max(_squares(before).sum(), LEAST)) ** 0.5)


def _cosine(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Mean cosine of vectors along the last axis, over all others."""
    total, count = 0.0, 0
    for start in range(0, len(before), AT_ONCE):
        one, other = (each[start : start + AT_ONCE].astype(np.float64) for each in (before, after))
        lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        cosines = (one * other).sum(axis=-1) / np.maximum(lengths, LEAST)
        total, count = total + float(cosines.sum()), count + cosines.size
    return total / count
