"""Which token represents which patch after every cut, for the pictures on the report page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from edgeprune.images import normalise
from edgeprune.records import Sample, Schedule
from edgeprune.tasks import Task, task_of
from edgeprune.vit.fidelity import packed_outputs, pruned_module
from edgeprune.vit.models import Model
from edgeprune.vit.pruned import PrunedViT
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.tokens import Attended, Reduced, Reducer

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE_PX = 224  # largest side of a picture in a bundle
LOSSLESS_PX = 64  # pictures up to this side are PNG files, larger ones JPEG


def samples_of(
    model: Model,
    schedule: Schedule,
    pixels: NDArray[np.uint8],
    labels: Sequence[int] | None,
    names: Sequence[str],
    recovered: Model | None = None,
    task: Task | None = None,
) -> tuple[Sample, ...]:
    """Samples for a bundle from pictures (images, P, P, 3): small, with their groups of patches after every cut.

    Groups are computed with PyTorch in fp32. `labels` are class indices, `names` the names of the classes; both are
    for a model that classifies. The pruned model has the weights of `recovered`, if that is given. `task` is that of
    the model unless it is given.
    """
    images = torch.from_numpy(normalise(pixels, model.preprocessing))
    with torch.no_grad():
        groups, pruned = groups_of(recovered or model, schedule, images)
        dense = packed_outputs(pruned_module(model, "none", (model.vit.tokens,) * model.vit.depth)(images))
    losses = (task or task_of(model.task, model.vit)).losses(dense, pruned)
    samples = []
    for index, picture in enumerate(pixels):
        told: dict[str, Any] = {"cosine": 1 - float(losses[index])}
        if model.task == "dense":
            told = {"error": float(losses[index]) ** 0.5}
        if model.task == "classify":
            told = {
                "label": names[labels[index]] if labels else None,
                "unpruned": names[int(dense[index].argmax())],
                "pruned": names[int(pruned[index].argmax())],
            }
        patches = tuple(tuple(cut[index].tolist()) for cut in groups)
        samples.append(Sample(picture=small(picture), groups=patches, **told))
    return tuple(samples)


def groups_of(model: Model, schedule: Schedule, images: Tensor) -> tuple[list[Tensor], NDArray[np.float32]]:
    """For each cut the index (B, patches) of the token that holds each patch, -1 for none; and the outputs."""
    vit = model.vit
    reducer = reducer_named(schedule.method)
    watched = Watched(reducer) if reducer else None
    network = PrunedViT(model.module, model.family, vit, schedule.tokens, watched, schedule.prefix_last)
    outputs = packed_outputs(network(images))
    place, after = torch.arange(vit.prefix, vit.tokens).expand(len(images), -1), []
    for moved in watched.moved if watched else ():
        place = torch.where(place < 0, place, moved.gather(1, place.clamp(min=0)))
        after.append(place)
    return after, outputs


class Watched:
    """A reducer that records for each call which token each input token went to: `moved`, (B, N), -1 for none."""

    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer
        self.moved: list[Tensor] = []

    def __call__(self, x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Reduced:
        share, place = shares(self.reducer, x, sizes, attended, keep, prefix).max(dim=1)
        self.moved.append(torch.where(share > 0, place, -1))
        return self.reducer(x, sizes, attended, keep, prefix)


def shares(reducer: Reducer, x: Tensor, sizes: Tensor | None, attended: Attended, keep: int, prefix: int) -> Tensor:
    """(B, keep, N): the weight of each token of x (B, N, C) in each token that a reducer leaves.

    With its choice fixed, a reducer is linear in x and treats all channels alike. So these weights are its gradient:
    in one backward pass, channel c gives the weights in output token c.
    """
    channels = x.shape[2]
    marks = pad(torch.eye(keep, dtype=x.dtype), (0, -keep % channels)).split(channels, dim=1)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        left = reducer(x, sizes, attended, keep, prefix).x
        weights = [torch.autograd.grad(left, x, mark.expand_as(left), retain_graph=True)[0] for mark in marks]
    return torch.cat(weights, dim=2)[..., :keep].transpose(1, 2)


def small(picture: NDArray[np.uint8]) -> bytes:
    """(P, P, 3) bytes as a PNG or JPEG file of at most SIDE_PX a side."""
    image = Image.fromarray(picture)
    image.thumbnail((SIDE_PX, SIDE_PX))
    file = io.BytesIO()
    if max(image.size) <= LOSSLESS_PX:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=88)
    return file.getvalue()
