"""The user's head on dense features (a decoder as an ONNX file), run on this CPU to compare its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import InputError
from edgeprune.io import key_of, sha256_file
from edgeprune.onnx_graph.graph import weights_of
from edgeprune.onnx_graph.onnx_runtime import outputs_of, session_of
from edgeprune.records import Output, Vit

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 16  # pictures at a time where the file does not fix it


class Head:
    """An ONNX file whose inputs are outputs of the model, by name; its first output is what counts.

    An input is (B, rows, columns, C) for features, (B, C) for the embedding; B is any or fixed. A single input may
    have any name where the model has features of one layer. Nothing in the file but its graph is used: torch files
    are refused, as they can run code when they are read. Raises InputError where it does not fit, MissingError.
    """

    def __init__(self, path: Path, vit: Vit) -> None:
        if not path.is_file():
            raise InputError(f"{path}: no such file: pass --head HEAD.onnx")
        if path.suffix != ".onnx":
            raise InputError(f"{path} is not ONNX: write the head with torch.onnx.export and pass that file")
        self.path, self.key = path, key_of([sha256_file(part) for part in (path, *weights_of(path))])
        self._session = session_of(path, error=InputError)
        inputs = self._session.get_inputs()
        known = {output.name: output for output in vit.outputs}
        self._inputs: dict[str, Output] = {}  # by name in the head
        batches = set()
        for each in inputs:
            output = known.get(each.name)
            if output is None and len(inputs) == 1 and len(vit.layers) == 1:
                output = vit.outputs[0]
            if output is None:
                names = ", ".join(known)
                raise InputError(
                    f"{path} takes {each.name}, the model gives {names}: rename its input or pass --layers"
                )
            shape = tuple(each.shape)
            fits = len(shape) == 1 + len(output.shape) and all(
                not isinstance(size, int) or size == wanted
                for size, wanted in zip(shape[1:], output.shape, strict=True)
            )
            if not fits or each.type != "tensor(float)":
                found = ", ".join(map(str, shape))
                wanted = ", ".join(map(str, ("B", *output.shape)))
                raise InputError(
                    f"{path} takes {each.name} ({found}) in {each.type}, the model gives {output.name} ({wanted}) in "
                    "tensor(float): export a head for this model"
                )
            self._inputs[each.name] = output
            batches |= {shape[0]} if isinstance(shape[0], int) else set()
        if not inputs or len(batches) > 1:
            raise InputError(f"{path} has no inputs of one batch size: export a head for this model")
        self._batch = next(iter(batches), None)
        self({output.name: np.zeros((1, *output.shape), np.float32) for output in vit.outputs})

    def __call__(self, outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """The head's first output, (images, …) fp32, for outputs (images, …) by name. Raises InputError."""
        count, step = len(next(iter(outputs.values()))), self._batch or CHUNK
        rows = []
        for start in range(0, count, step):
            feed = {name: outputs[output.name][start : start + step] for name, output in self._inputs.items()}
            real = min(step, count - start)
            if self._batch is not None:
                feed = {name: np.resize(part, (step, *part.shape[1:])) for name, part in feed.items()}
            try:
                found = outputs_of(self._session, None, feed, self.path)[0]
            except Exception as error:  # onnxruntime raises many types, all derived from Exception alone
                detail = " ".join(str(error).split())[:160]
                raise InputError(f"{self.path} cannot run on the features ({detail}): export it again") from None
            if found.ndim < 2 or len(found) != len(next(iter(feed.values()))):
                raise InputError(f"{self.path} gives {found.shape}, not one row for each picture: export it again")
            rows.append(np.asarray(found[:real], np.float32))
        return np.concatenate(rows)
