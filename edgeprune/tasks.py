"""What the output of a model is for, and how a pruned model's outputs are compared with the unpruned ones.

One object for each task of records.TASKS. `outputs` are (images, C) fp32: logits of classes, embeddings, or all
values of several outputs (features.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from edgeprune import stats
from edgeprune.features import Dense, Head
from edgeprune.records import ClassFidelity, DenseFidelity, EmbedFidelity, Fidelity, Vit

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEAREST = 5  # neighbours that count for recall and for the vote
TEMPERATURE = 0.07  # of the votes of neighbours (Wu et al., arXiv 1805.01978; DINO, arXiv 2104.14294, votes so)
AT_ONCE = 1 << 24  # cosines held at a time, which limits memory
LEAST_NORM = 1e-12


class Task(Protocol):
    """The figures of a task; all of them are of the same pictures, unpruned first."""

    name: str
    output: str  # name of the output in the ONNX, of several the last
    loss_name: str
    loss_unit: str
    top1_name: str
    agreement_name: str
    sensitive: float  # a layer that loses more by being quantised alone stays in floating point
    least_images: int

    def losses(self, dense: NDArray[np.float32], outputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """What a schedule should make small, for each picture, (images,)."""
        ...

    def off(self, found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.floating]:
        """How far the outputs of two runtimes are apart, (images,): rounding, or something computed wrongly."""
        ...

    def fidelity(
        self, dense: NDArray[np.float32] | None, outputs: NDArray[np.float32], labels: Sequence[int] | None
    ) -> Fidelity:
        """All figures; those of the comparison are None without unpruned outputs, those of labels without labels."""
        ...


@runtime_checkable
class Answers(Protocol):
    """A task whose outputs are answers, which can be the same and can be right."""

    def agrees(self, dense: NDArray[np.float32], outputs: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Is the answer for a picture that of the unpruned model? (images,)."""
        ...

    def right(self, outputs: NDArray[np.float32], labels: Sequence[int]) -> NDArray[np.bool_]:
        """Is the label of a picture predicted? (images,)."""
        ...


class Classify:
    """Logits of classes: KL of the class distributions, and the class that is predicted."""

    name, output = "classify", "logits"
    loss_name, loss_unit, top1_name, agreement_name = "KL", "nats", "top-1", "agreement"
    sensitive, least_images = 0.02, 1

    def losses(self, dense: NDArray[np.float32], outputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """KL divergence, nats."""
        return stats.kl_per_image(dense, outputs)

    def agrees(self, dense: NDArray[np.float32], outputs: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The same class."""
        same: NDArray[np.bool_] = dense.argmax(1) == outputs.argmax(1)
        return same

    def right(self, outputs: NDArray[np.float32], labels: Sequence[int]) -> NDArray[np.bool_]:
        """Top-1."""
        hits: NDArray[np.bool_] = outputs.argmax(1) == np.asarray(labels)
        return hits

    def off(self, found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.floating]:
        """Largest difference of a logit."""
        return stats.differences(found, wanted)

    def fidelity(
        self, dense: NDArray[np.float32] | None, outputs: NDArray[np.float32], labels: Sequence[int] | None
    ) -> ClassFidelity:
        """KL, agreement, top-1."""
        return ClassFidelity(
            kl=None if dense is None else float(self.losses(dense, outputs).mean()),
            agreement=None if dense is None else percent(self.agrees(dense, outputs)),
            top1=percent(self.right(outputs, labels)) if labels else None,
        )


class Embed:
    """Embeddings: their direction, and which other pictures are nearest by cosine.

    `texts` (classes, C), the embeddings of the names of classes, add zero-shot figures (CLIP, arXiv 2103.00020).
    """

    name, output = "embed", "embedding"
    loss_name, loss_unit, top1_name, agreement_name = "1 − cosine", "", "k-NN top-1", "nearest-neighbour agreement"
    sensitive, least_images = 0.002, NEAREST + 1

    def __init__(self, texts: NDArray[np.float32] | None = None) -> None:
        self.texts = texts

    def losses(self, dense: NDArray[np.float32], outputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """1 - cosine."""
        loss: NDArray[np.float64] = 1 - np.clip((directions(dense) * directions(outputs)).sum(axis=1), -1, 1)
        return loss

    def agrees(self, dense: NDArray[np.float32], outputs: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The same other picture is nearest."""
        same: NDArray[np.bool_] = neighbours(dense)[0][:, 0] == neighbours(outputs)[0][:, 0]
        return same

    def right(self, outputs: NDArray[np.float32], labels: Sequence[int]) -> NDArray[np.bool_]:
        """Do the nearest other pictures vote for the label? Each vote weighs exp(cosine / TEMPERATURE)."""
        near, cosines = neighbours(outputs)
        known, index = np.unique(np.asarray(labels), return_inverse=True)
        votes = np.zeros((len(outputs), len(known)))
        rows = np.arange(len(outputs))
        for place in range(near.shape[1]):
            votes[rows, index[near[:, place]]] += np.exp((cosines[:, place] - cosines[:, 0]) / TEMPERATURE)
        hits: NDArray[np.bool_] = votes.argmax(axis=1) == index
        return hits

    def off(self, found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.floating]:
        """Length of the difference relative to that of the wanted embedding: lengths differ widely among models."""
        apart = np.linalg.norm(found.astype(np.float64) - wanted, axis=1)
        length = np.linalg.norm(wanted.astype(np.float64), axis=1)
        relative: NDArray[np.floating] = apart / np.maximum(length, LEAST_NORM)
        return relative

    def fidelity(
        self, dense: NDArray[np.float32] | None, outputs: NDArray[np.float32], labels: Sequence[int] | None
    ) -> EmbedFidelity:
        """Cosine, neighbours, top-1 of k nearest neighbours."""
        if dense is None:
            return EmbedFidelity(knn_top1=percent(self.right(outputs, labels)) if labels else None)
        cosines = 1 - self.losses(dense, outputs)
        before, after = neighbours(dense)[0], neighbours(outputs)[0]
        return EmbedFidelity(
            cosine=float(cosines.mean()),
            cosine_p1=float(np.percentile(cosines, 1)),
            neighbour_agreement=percent(before[:, 0] == after[:, 0]),
            recall5=percent((before[:, :, None] == after[:, None, :]).any(axis=2)),
            knn_top1=percent(self.right(outputs, labels)) if labels else None,
            dense_knn_top1=percent(self.right(dense, labels)) if labels else None,
            **self.zero_shot(dense, outputs, labels),
        )

    def zero_shot(
        self, dense: NDArray[np.float32], outputs: NDArray[np.float32], labels: Sequence[int] | None
    ) -> dict[str, float]:
        """The figures of the class whose text is nearest; none without texts."""
        if self.texts is None:
            return {}
        texts = directions(self.texts)
        before, after = ((directions(each) @ texts.T).argmax(axis=1) for each in (dense, outputs))
        found = {"zero_shot_agreement": percent(before == after)}
        if labels:
            found["zero_shot_top1"] = percent(after == np.asarray(labels))
            found["dense_zero_shot_top1"] = percent(before == np.asarray(labels))
        return found


CLASSIFY = Classify()
BY_NAME: dict[str, Task] = {"classify": CLASSIFY, "embed": Embed(), "dense": Dense()}  # for names


def task_of(name: str, vit: Vit, texts: NDArray[np.float32] | None = None, head: Head | None = None) -> Task:
    """The task of a model; `texts` as in Embed, `head` as in Dense."""
    if name == "dense":
        return Dense(vit.outputs, head)
    return BY_NAME[name] if texts is None else Embed(texts)


def output_names(name: str, vit: Vit) -> tuple[str, ...]:
    """The outputs of a model of this task in the ONNX, in order."""
    return tuple(output.name for output in vit.outputs) or (BY_NAME[name].output,)


def percent(hits: NDArray[np.bool_]) -> float:
    """Share of True, percent."""
    return float(hits.mean() * 100)


def points_lost(
    task: Task, dense: NDArray[np.float32], outputs: NDArray[np.float32], labels: Sequence[int] | None
) -> tuple[float, str]:
    """Points of top-1 that `outputs` lose against `dense`, points of agreement without labels; and which it is.

    Of dense features it is the relative error, percent.
    """
    if not isinstance(task, Answers):
        error = task.fidelity(dense, outputs, None)
        assert isinstance(error, DenseFidelity) and error.error is not None
        return 100 * error.error, "relative error"
    if labels:
        return percent(task.right(dense, labels)) - percent(task.right(outputs, labels)), task.top1_name
    return 100 - percent(task.agrees(dense, outputs)), task.agreement_name


def points_from(dense_top1: float | None, top1: float | None, agreement: float | None) -> float | None:
    """points_lost from figures, percent, that are known already; None where too few are."""
    if dense_top1 is not None and top1 is not None:
        return dense_top1 - top1
    return None if agreement is None else 100 - agreement


def typically_off(task: Task, found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Median over images of how far the outputs of two runtimes are apart; NaN if any output is NaN.

    Runtimes round differently, so that either of two tokens with equal scores may be kept and a single image may
    differ. An engine that computes something wrong differs on most images.
    """
    return float(np.median(task.off(found, wanted)))


def directions(outputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Embeddings (images, C) scaled to length 1; those of length 0 stay so."""
    rows = outputs.astype(np.float64)
    unit: NDArray[np.float64] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), LEAST_NORM)
    return unit


def neighbours(outputs: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The NEAREST other pictures by cosine, nearest first, and these cosines: (images, NEAREST) each.

    All others where there are fewer. Needs two pictures.
    """
    unit = directions(outputs)
    count, most = len(unit), min(NEAREST, len(unit) - 1)
    near, cosines = np.empty((count, most), np.int64), np.empty((count, most))
    for rows in np.array_split(np.arange(count), -(-count * count // AT_ONCE)):
        similar, own = unit[rows] @ unit.T, np.arange(len(rows))
        similar[own, rows] = -np.inf  # the picture itself
        for place in range(most):
            best = similar.argmax(axis=1)  # of equal ones the first
            near[rows, place], cosines[rows, place] = best, similar[own, best]
            similar[own, best] = -np.inf
    return near, cosines
