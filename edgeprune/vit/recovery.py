"""Recovery: tune the weights of a pruned model to the answers of the unpruned one, on pictures without labels."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import ceil, cos, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.images import normalise
from edgeprune.io import key_of, sha256_bytes
from edgeprune.onnx_graph.int8 import Int8Layer
from edgeprune.records import Preprocessing, Progress, Recovery, silent
from edgeprune.tasks import BY_NAME
from edgeprune.vit.augmentation import Augmentation, augmented
from edgeprune.vit.distillation import LOSSES, relative_error, stream_before, traced
from edgeprune.vit.fake_int8 import FakeInt8
from edgeprune.vit.fidelity import CHUNK, outputs_of
from edgeprune.vit.models import weights_sha256
from edgeprune.vit.pruned import PrunedViT, flattened
from edgeprune.vit.recovery_files import State, state_copy

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)
Outputs: TypeAlias = "Callable[[PrunedViT, NDArray[np.uint8], Preprocessing], NDArray[np.float32]]"

# Loss by task: a pruned model that is closer to the unpruned one is tuned at a lower rate. KL, nats; squared relative
# error; 1 - cosine, which for vectors of one length is half of that.
FAR = {"classify": 0.4, "dense": 3.0, "embed": 1.5}
AFTER = ("norm", "attn_pool", "fc_norm", "head", "head_dist")  # what timm's models have behind the blocks
DIVERGED = 100.0  # nats: a larger loss, or one that is no number, counts as this


@dataclass(frozen=True)
class Recipe:
    """How weights are tuned; the defaults were chosen by measurement (docs/benchmarks.md)."""

    epochs: int = 8
    least_steps: int = 150  # few pictures get more epochs
    rate: float = 4e-5  # largest learning rate where the loss before is FAR or more
    batch: int = 26
    warmup: int = 20  # steps
    validation: float = 0.25  # share of the pictures that is never trained on
    average: float = 0.95  # of the weights so far in their moving average; 0: none is kept
    patience: float = 0.5  # share of all epochs without a better state, after which it stops
    temperature: float = 4.0  # of both softmaxes in the loss (arXiv 1503.02531); what is judged is at 1
    features: float = 5.0  # weight of the relative error of the prefix tokens after every block
    augmentation: Augmentation = Augmentation()  # noqa: RUF009 it is a tuple
    seed: int = 0

    def lengths(self, images: int) -> tuple[int, int, int]:
        """Of so many pictures: those never trained on, steps of an epoch, epochs."""
        held = max(1, round(self.validation * images))
        steps = ceil((images - held) / self.batch)
        return held, steps, max(self.epochs, ceil(self.least_steps / steps))

    @property
    def parts(self) -> dict[str, object]:
        """Everything that the result depends on besides model and pictures, for the key of a step."""
        return {**asdict(self), "trained_on": device().type}


class Tuned(NamedTuple):
    """A pruned model with the best weights, on the CPU, and how they came about."""

    module: PrunedViT
    record: Recovery


def device() -> torch.device:
    """A GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def recovered(
    pruned: PrunedViT,
    pixels: NDArray[np.uint8],
    how: Preprocessing,
    recipe: Recipe = Recipe(),
    checkpoint: Path | None = None,
    progress: Progress = silent,
    task: str = "classify",
    int8: Sequence[Int8Layer] = (),
    outputs: Outputs = outputs_of,
    until: int | None = None,
) -> Tuned:
    """Self-distillation: `pruned` with weights with which it answers most like the unpruned model.

    pixels: (images, P, P, 3). The loss is the KL divergence from the unpruned model's class probabilities for the
    same augmented picture (Hinton et al., arXiv 1503.02531; Beyer et al., arXiv 2106.05237); where `task` is embed it
    is 1 - cosine, where it is dense the squared relative error of all features and the embedding. A seeded share of
    the pictures is never trained on; the state with the lowest loss on it is returned, the original weights
    (epochs = 0) where none is lower. `pruned` itself is not changed. With `checkpoint`, an interrupted run continues
    after its last whole epoch, with the same result. With `int8`, the layers that will be INT8, the pruned model is
    trained and judged with their rounding. `outputs` computes those of the held-out pictures where nothing is
    rounded, with the same bits as vit.fidelity.outputs_of. It stops after `until` epochs; with a checkpoint, another
    call continues. Raises InputError for a checkpoint of another run, OutputError, ExportError.
    """
    run = _Run(pruned, pixels, how, recipe, progress, task, int8, outputs)
    state = run.state
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
        log.info("recovery: continuing after epoch %d of %d", state.epoch, run.epochs)
    last = run.epochs if until is None else min(until, run.epochs)
    while state.epoch < last and state.epoch - state.best_epoch < recipe.patience * run.epochs:
        run.train_epoch()
        run.judge()
        log.info(
            "recovery: epoch %d of %d, held-out %s %.3g (%.3g before)",
            state.epoch, run.epochs, BY_NAME[task].loss_name, state.curve[-1], state.curve[0],
        )  # fmt: skip
        if checkpoint is not None:
            state.save(checkpoint)
    return run.finished()


class _Run:
    """One run of self-distillation."""

    def __init__(
        self,
        pruned: PrunedViT,
        pixels: NDArray[np.uint8],
        how: Preprocessing,
        recipe: Recipe,
        progress: Progress,
        task: str,
        int8: Sequence[Int8Layer],
        outputs: Outputs,
    ) -> None:
        self.outputs = outputs
        self.task, self.loss = task, LOSSES[task]
        self.features = 0.0 if task == "dense" else recipe.features  # the patches are what counts there
        self.rounding: AbstractContextManager[object] = FakeInt8(int8) if int8 else nullcontext()
        self.recipe, self.how, self.device, self.progress = recipe, how, device(), progress
        self.teacher = unpruned(pruned).to(self.device).eval().requires_grad_(False)
        self.student = with_own_weights(pruned).to(self.device).eval()
        # With rounding the blocks before the first cut differ from the unpruned model's, too.
        self.first = 0 if int8 else first_cut(pruned)
        trained = trainable(self.student, self.first)
        order = np.random.default_rng(recipe.seed).permutation(len(pixels))
        held, self.steps, self.epochs = recipe.lengths(len(pixels))
        self.pixels, self.training = pixels, np.sort(order[held:])  # indices
        self.validation = pixels[np.sort(order[:held])]
        self.wanted = self.answers(self.teacher)
        optimiser = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
        start, loss = state_copy(self.student), self.held_out_loss()
        self.rate = recipe.rate * min(1.0, max(loss, 0.0) / FAR[task]) ** 0.5
        key = key_of(
            recipe.parts, task, weights_sha256(pruned.model), pruned.vit, pruned.tokens, pruned.prefix_last,
            getattr(pruned.reducer, "__name__", None), how, sha256_bytes(pixels.reshape(-1).data), tuple(int8),
        )  # fmt: skip
        self.state = State(self.student, optimiser, dict(start), dict(start), 0, [loss], key)

    def train_epoch(self) -> None:
        """One pass over the training pictures; its randomness depends on the seed and the epoch alone."""
        recipe, state = self.recipe, self.state
        random, steps = np.random.default_rng([recipe.seed, state.epoch]), self.epochs * self.steps
        held_out = f"held-out {BY_NAME[self.task].loss_name} {min(state.curve):.3g}, {state.curve[0]:.3g} before"
        what = f"recovering, step (epoch {state.epoch + 1} of {self.epochs}, {held_out})"
        for index, part in enumerate(np.array_split(random.permutation(len(self.training)), self.steps)):
            step = state.epoch * self.steps + index
            self.progress(what, step, steps)
            for group in state.optimiser.param_groups:
                group["lr"] = self.rate * rate_at(step, recipe.warmup, steps)
            pixels = self.pixels[self.training[part]]
            images = augmented(pixels, self.how, random, recipe.augmentation).to(self.device)
            with self.mixed_precision():
                with torch.no_grad():
                    stream = stream_before(self.teacher, self.first, images)
                    wanted, passed = traced(self.teacher, stream, self.first)
                with self.rounding:
                    if not self.first:  # else the student's are the same
                        stream = stream_before(self.student, 0, images)
                    answers, own = traced(self.student, stream, self.first)
            loss = self.loss(wanted, answers, recipe.temperature)
            if self.features and own:
                loss = loss + self.features * relative_error(passed, own, self.student.vit.depth)
            state.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            state.optimiser.step()
            self.add_to_average(step)

    def add_to_average(self, step: int) -> None:
        """Move the average towards the weights; after few steps faster, so that it forgets the original weights."""
        share = min(self.recipe.average, (step + 1) / (step + 10))
        if share:
            for name, value in self.student.state_dict().items():
                if value.is_floating_point():
                    self.state.average[name].lerp_(value.detach().cpu(), 1 - share)

    def judge(self) -> None:
        """Add the held-out loss to the curve, of the weights or of their average; keep the best state so far."""
        state, weights = self.state, state_copy(self.student)
        found = [(self.held_out_loss(), weights)]
        if self.recipe.average:
            self.student.load_state_dict(state.average)
            found.append((self.held_out_loss(), state.average))
            self.student.load_state_dict(weights)
        loss, best = min(found, key=lambda pair: pair[0])
        log.debug("recovery: held-out loss %s", [round(each, 4) for each, _ in found])
        if loss < min(state.curve):
            state.best, state.best_epoch = {name: value.clone() for name, value in best.items()}, state.epoch + 1
        state.curve.append(loss)

    def finished(self) -> Tuned:
        """The module with the best weights."""
        state, kl = self.state, self.task == "classify"
        self.student.load_state_dict(state.best)
        self.student.cpu().requires_grad_(False)
        record = Recovery(
            task=self.task,
            images=len(self.training) + len(self.validation),
            validation_images=len(self.validation),
            epochs=state.best_epoch,
            kl_before=state.curve[0] if kl else None,
            kl_after=state.curve[state.best_epoch] if kl else None,
            curve=tuple(state.curve),
            rate=self.rate,
            fake_int8=isinstance(self.rounding, FakeInt8),
            seed=self.recipe.seed,
            weights_sha256=weights_sha256(self.student.model),
        )
        return Tuned(self.student, record)

    def answers(self, module: PrunedViT) -> Tensor:
        """Outputs (images, values) on the held-out pictures."""
        if module is self.teacher or not isinstance(self.rounding, FakeInt8):
            return torch.from_numpy(self.outputs(module, self.validation, self.how)).to(self.device)
        rows = []  # one pass at a time, in this thread, is what the rounding is for
        for start in range(0, len(self.validation), CHUNK):
            images = normalise(self.validation[start : start + CHUNK], self.how)
            with torch.no_grad(), self.rounding:
                rows.append(flattened(module(torch.from_numpy(images).to(self.device))))
        return torch.cat(rows)

    def held_out_loss(self) -> float:
        """Mean loss of the student on the held-out pictures; DIVERGED at most."""
        loss = float(self.loss(self.wanted, self.answers(self.student), 1.0))
        return loss if loss < DIVERGED else DIVERGED

    def mixed_precision(self) -> torch.autocast:
        """bfloat16 for matmuls on a GPU; fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def with_own_weights(pruned: PrunedViT) -> PrunedViT:
    """The same pruned model with a copy of the parameters."""
    module = copy.deepcopy(pruned.model)
    return PrunedViT(module, pruned.family, pruned.vit, pruned.tokens, pruned.reducer, pruned.prefix_last)


def unpruned(pruned: PrunedViT) -> PrunedViT:
    """The model with all its tokens and a copy of the parameters."""
    every = (pruned.vit.tokens,) * pruned.vit.depth
    return PrunedViT(copy.deepcopy(pruned.model), pruned.family, pruned.vit, every, None, pruned.prefix_last)


def first_cut(pruned: PrunedViT) -> int:
    """The first block that removes tokens: those before it get and give the tokens of the unpruned model."""
    return next((block for block, n in enumerate(pruned.tokens) if n < pruned.vit.tokens), 0)


def trainable(pruned: PrunedViT, first: int) -> list[nn.Parameter]:
    """The parameters to tune: all, or from block `first` on those of the blocks and of what follows them."""
    model: Any = pruned.model
    model.requires_grad_(first == 0)
    for part in (*model.blocks[first:], *(getattr(model, name, None) for name in AFTER)):
        if part is not None:
            part.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def rate_at(step: int, warmup: int, steps: int) -> float:
    """Learning rate as a share of the largest: linear warm-up, then a cosine to 0 (arXiv 1608.03983)."""
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / (steps - warmup)))
