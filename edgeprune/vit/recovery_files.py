"""Files of recovery: a checkpoint after every epoch, and the finished weights with their record."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeprune.errors import InputError
from edgeprune.io import replacing
from edgeprune.records import Recovery
from edgeprune.vit.models import Model

log = logging.getLogger(__name__)


@dataclass
class State:
    """What an epoch starts from: weights, their moving average, the optimiser; and the best weights so far."""

    student: nn.Module
    optimiser: torch.optim.Optimizer
    average: dict[str, Tensor]
    best: dict[str, Tensor]
    best_epoch: int
    curve: list[float]  # held-out KL before the first epoch and after each, nats
    key: str  # hash of all that the result depends on

    @property
    def epoch(self) -> int:
        """Epochs that are finished."""
        return len(self.curve) - 1

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically. Raises OutputError."""
        names = ("average", "best", "best_epoch", "curve", "key")
        saved = {name: getattr(self, name) for name in names} | {
            "student": self.student.state_dict(), "optimiser": self.optimiser.state_dict(),
        }  # fmt: skip
        with replacing(path) as temporary:
            torch.save(saved, temporary)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; nothing but tensors, numbers and text is read from it.

        Raises InputError for the checkpoint of another run, and for other files.
        """
        try:
            saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            known = saved["key"]
        except Exception as error:  # pickle, zip and torch each raise their own
            raise InputError(f"{path}: not a recovery checkpoint ({type(error).__name__}): remove it") from None
        if known != self.key:
            raise InputError(f"{path} is the checkpoint of another recovery: remove it or name another file")
        self.student.load_state_dict(saved.pop("student"))
        self.optimiser.load_state_dict(saved.pop("optimiser"))
        for name, value in saved.items():
            setattr(self, name, value)


def state_copy(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def save_recovered(module: nn.Module, record: Recovery, path: Path) -> None:
    """Write the weights of a timm model, and how they came about, as one safetensors file. Raises OutputError."""
    weights = {name: value.contiguous() for name, value in state_copy(module).items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, {"recovery": msgspec.json.encode(record).decode()})


def load_recovered(model: Model, path: Path) -> tuple[Model, Recovery]:
    """The model with the weights in a file of `save_recovered`, and their record; `model` itself is not changed."""
    with safe_open(path, framework="pt") as file:
        record = msgspec.json.decode(file.metadata()["recovery"], type=Recovery)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is not a dict
    module = copy.deepcopy(model.module)
    module.load_state_dict(weights)
    return replace(model, module=module.eval()), record
