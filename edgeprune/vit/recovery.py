"""Recovery: tune the weights of a pruned model to the answers of the unpruned one, on pictures without labels."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass, replace
from math import ceil, cos, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from edgeprune.images import normalise
from edgeprune.io import replacing
from edgeprune.records import Preprocessing, Progress, Recovery, Schedule, silent
from edgeprune.vit.augmentation import Augmentation, augmented
from edgeprune.vit.fidelity import pruned_module
from edgeprune.vit.models import Model, weights_sha256
from edgeprune.vit.pruned import PrunedViT

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

CHUNK = 26  # pictures at a time where nothing is trained


@dataclass(frozen=True)
class Recipe:
    """How weights are tuned; the defaults were chosen by measurement (docs/benchmarks.md)."""

    epochs: int = 16
    rate: float = 3e-5  # largest learning rate
    batch: int = 26
    warmup: int = 20  # steps
    validation: float = 0.25  # share of the pictures that is never trained on
    average: float = 0.95  # of the weights so far in their moving average; 0: none is kept
    patience: int = 4  # epochs without a better state, after which it stops
    weight_decay: float = 0.0
    temperature: float = 1.0  # of both softmaxes (arXiv 1503.02531)
    augmentation: Augmentation = Augmentation()
    seed: int = 0

    @property
    def parts(self) -> dict[str, object]:
        """Everything that the result depends on, for the key of a step."""
        return {**asdict(self), "on": device().type}


class Trained(NamedTuple):
    """A pruned model with the best weights, and how they came about."""

    module: PrunedViT
    record: Recovery


@dataclass
class State:
    """Everything that an epoch starts from: weights, their average, the optimiser, and the best weights so far."""

    epoch: int
    student: nn.Module
    average: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    best: dict[str, Tensor]
    best_epoch: int
    curve: list[float]  # held-out KL before the first epoch and after each, the better of weights and average

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically. Raises OutputError."""
        with replacing(path) as temporary:
            torch.save(
                {
                    "epoch": self.epoch, "student": self.student.state_dict(), "average": self.average,
                    "optimiser": self.optimiser.state_dict(), "best": self.best, "best_epoch": self.best_epoch,
                    "curve": self.curve,
                },
                temporary,
            )  # fmt: skip

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; only tensors and numbers are read from it."""
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        self.student.load_state_dict(saved["student"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.epoch, self.best_epoch, self.curve = saved["epoch"], saved["best_epoch"], saved["curve"]
        self.average, self.best = saved["average"], saved["best"]


def distilled(
    pruned: PrunedViT,
    pixels: NDArray[np.uint8],
    how: Preprocessing,
    recipe: Recipe = Recipe(),
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Trained:
    """Self-distillation: `pruned` with weights with which it answers most like the unpruned model.

    pixels: (images, P, P, 3). The loss is the KL divergence from the unpruned model's class probabilities for
    the same augmented picture (Hinton et al., arXiv 1503.02531; Beyer et al., arXiv 2106.05237). A seeded share of the
    pictures is never trained on; the state with the lowest KL on it is returned, the original weights (epochs = 0)
    where none is lower. `pruned` itself is not changed. With `checkpoint`, an interrupted run continues after its last
    whole epoch, with the same result. Raises OutputError.
    """
    return _Run(pruned, pixels, how, recipe, device(), progress).trained(checkpoint)


def device() -> torch.device:
    """A GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tuned(
    model: Model,
    schedule: Schedule,
    pixels: NDArray[np.uint8],
    recipe: Recipe = Recipe(),
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Trained:
    """`distilled` for a model with a schedule; the model is not changed."""
    pruned = pruned_module(model, schedule.method, schedule.tokens, schedule.prefix_last)
    return distilled(pruned, pixels, model.preprocessing, recipe, checkpoint, progress)


def save_tuned(module: PrunedViT, record: Recovery, path: Path) -> None:
    """Write weights and record as one safetensors file. Raises OutputError."""
    weights = {name: value.contiguous() for name, value in _weights(module.model).items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, {"recovery": msgspec.json.encode(record).decode()})


def load_tuned(model: Model, path: Path) -> tuple[Model, Recovery]:
    """The model with the weights in a file of `save_tuned`, and their record; `model` itself is not changed."""
    with safe_open(path, framework="pt") as file:
        record = msgspec.json.decode(file.metadata()["recovery"], type=Recovery)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is not a dict
    module = copy.deepcopy(model.module)
    module.load_state_dict(weights)
    return replace(model, module=module.eval()), record


class _Run:
    """One run of self-distillation."""

    def __init__(
        self, pruned: PrunedViT, pixels: NDArray[np.uint8], how: Preprocessing, recipe: Recipe, device: torch.device,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.recipe, self.how, self.device, self.progress = recipe, how, device, progress
        self.teacher = copy.deepcopy(pruned.model).to(device).eval().requires_grad_(False)
        self.student = with_copied_weights(pruned).to(device).eval().requires_grad_(True)
        order = np.random.default_rng(recipe.seed).permutation(len(pixels))
        held = max(1, round(recipe.validation * len(pixels)))
        self.training, self.validation = pixels[np.sort(order[held:])], pixels[np.sort(order[:held])]
        self.steps = ceil(len(self.training) / recipe.batch)
        self.wanted = self.answers(self.teacher)

    def trained(self, checkpoint: Path | None) -> Trained:
        """All epochs; the best weights."""
        recipe, student = self.recipe, self.student
        optimiser = torch.optim.AdamW(student.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay)
        start = _weights(student)
        state = State(0, student, dict(start), optimiser, dict(start), 0, [self.held_out_kl()])
        if checkpoint is not None and checkpoint.exists():
            state.load(checkpoint)
            log.info("recovery: going on after epoch %d of %d", state.epoch, recipe.epochs)
        while state.epoch < recipe.epochs and state.epoch - state.best_epoch < recipe.patience:
            self.train_epoch(state)
            self.judge(state)
            log.info(
                "recovery: epoch %d of %d, held-out KL %.4f (%.4f before)",
                state.epoch, recipe.epochs, state.curve[-1], state.curve[0],
            )  # fmt: skip
            if checkpoint is not None:
                state.save(checkpoint)
        student.load_state_dict(state.best)
        student.cpu().requires_grad_(False)
        record = Recovery(
            images=len(self.training) + len(self.validation),
            validation_images=len(self.validation),
            epochs=state.best_epoch,
            kl_before=state.curve[0],
            kl_after=state.curve[state.best_epoch],
            curve=tuple(state.curve),
            rate=recipe.rate,
            seed=recipe.seed,
            weights_sha256=weights_sha256(student.model),
        )
        return Trained(student, record)

    def train_epoch(self, state: State) -> None:
        """One pass over the training pictures; randomness depends on the seed and the epoch alone."""
        recipe = self.recipe
        random = np.random.default_rng([recipe.seed, state.epoch])
        parts = np.array_split(random.permutation(len(self.training)), self.steps)
        what = f"recovering: held-out KL {min(state.curve):.4f} ({state.curve[0]:.4f} before), epoch {state.epoch + 1}, step"
        for index, part in enumerate(parts):
            step = state.epoch * self.steps + index
            self.progress(what, step, recipe.epochs * self.steps)
            for group in state.optimiser.param_groups:
                group["lr"] = recipe.rate * rate_at(step, recipe.warmup, recipe.epochs * self.steps)
            images = augmented(self.training[part], self.how, random, recipe.augmentation).to(self.device)
            with torch.no_grad(), self.mixed_precision():
                wanted = self.teacher(images)
            with self.mixed_precision():
                answers = self.student(images)
            loss = divergence(wanted, answers, recipe.temperature)
            state.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            state.optimiser.step()
            if recipe.average:
                share = min(recipe.average, (step + 1) / (step + 10))  # an average of few steps forgets the start
                for name, value in self.student.state_dict().items():
                    if value.is_floating_point():
                        state.average[name] = torch.lerp(value.detach().cpu(), state.average[name], share)
        state.epoch += 1

    def judge(self, state: State) -> None:
        """Add the held-out KL of weights and average to the curve; keep the better one if it is the best so far."""
        weights = _weights(self.student)
        found = [(self.held_out_kl(), weights)]
        if self.recipe.average:
            self.student.load_state_dict(state.average)
            found.append((self.held_out_kl(), dict(state.average)))
            self.student.load_state_dict(weights)
        kl, best = min(found, key=lambda pair: pair[0])
        log.debug("recovery: %s", [round(each, 4) for each, _ in found])
        if kl < min(state.curve):
            state.best, state.best_epoch = best, state.epoch
        state.curve.append(kl)

    def answers(self, module: nn.Module) -> Tensor:
        """Logits (images, classes) on the held-out pictures."""
        rows = []
        with torch.no_grad():
            for start in range(0, len(self.validation), CHUNK):
                images = normalise(self.validation[start : start + CHUNK], self.how)
                rows.append(module(torch.from_numpy(images).to(self.device)).float())
        return torch.cat(rows)

    def held_out_kl(self) -> float:
        """Mean KL on the held-out pictures, nats."""
        return float(divergence(self.wanted, self.answers(self.student)))

    def mixed_precision(self) -> torch.autocast:
        """bfloat16 for the matmuls of a GPU; nothing on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def with_copied_weights(pruned: PrunedViT) -> PrunedViT:
    """The same pruned model with parameters of its own."""
    module = copy.deepcopy(pruned.model)
    return PrunedViT(module, pruned.family, pruned.vit, pruned.tokens, pruned.reducer, pruned.prefix_last)


def divergence(wanted: Tensor, answers: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL divergence, nats, of the softmaxes of logits (B, classes), times the squared temperature."""
    p, q = (log_softmax(logits.float() / temperature, dim=1) for logits in (wanted, answers))
    return kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def rate_at(step: int, warmup: int, steps: int) -> float:
    """Learning rate as a share of the largest: linear warm-up, then a cosine to 0 (arXiv 1608.03983)."""
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / (steps - warmup)))


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
