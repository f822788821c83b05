"""Outputs of a pruned model against those of the unpruned one, by task."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from edgeprune.records.base import Record, check_figures


class ClassFidelity(Record, frozen=True, kw_only=True, tag_field="task", tag="classify"):
    """Class predictions against those of the unpruned model on the same pictures; None where unknown."""

    cosine: ClassVar[None] = None
    kl: float | None = None  # nats
    agreement: float | None = None  # percent
    top1: float | None = None  # percent

    def __post_init__(self) -> None:
        check_figures([self.kl, self.agreement, self.top1], -1.0)


class EmbedFidelity(Record, frozen=True, kw_only=True, tag_field="task", tag="embed"):
    """Embeddings against those of the unpruned model on the same pictures; None where unknown, shares in percent."""

    kl: ClassVar[None] = None
    cosine: float | None = None  # mean over pictures
    cosine_p1: float | None = None  # 1st percentile over pictures
    neighbour_agreement: float | None = None  # the nearest other picture is the same
    recall5: float | None = None  # of the 5 nearest other pictures
    knn_top1: float | None = None  # leave-one-out with the labels of the pictures
    dense_knn_top1: float | None = None
    zero_shot_agreement: float | None = None  # the nearest of the given text embeddings is the same
    zero_shot_top1: float | None = None  # it is that of the label
    dense_zero_shot_top1: float | None = None

    def __post_init__(self) -> None:
        check_figures(msgspec.structs.astuple(self), -1.0)

    @property
    def agreement(self) -> float | None:
        """What stands in the place of the agreement of classes, percent."""
        return self.neighbour_agreement

    @property
    def top1(self) -> float | None:
        """What stands in the place of top-1, percent."""
        return self.knn_top1


class LayerFidelity(Record, frozen=True, kw_only=True):
    """Patch features of one layer against those of the unpruned model, on the full grid."""

    layer: int
    error: float  # length of the difference, all pictures together, relative to that of the unpruned features
    cosine: float  # mean over patches

    def __post_init__(self) -> None:
        check_figures([self.error, self.cosine], -1.0)


class DenseFidelity(Record, frozen=True, kw_only=True, tag_field="task", tag="dense"):
    """Patch features, and a head on them if one was given, against the unpruned ones; None where unknown."""

    kl: ClassVar[None] = None
    cosine: ClassVar[None] = None
    agreement: ClassVar[None] = None
    top1: ClassVar[None] = None
    error: float | None = None  # relative error of the head's output; without a head root mean square over layers
    layers: tuple[LayerFidelity, ...] = ()
    embedding_cosine: float | None = None  # mean over pictures
    head_error: float | None = None
    head_difference: float | None = None  # mean absolute difference of the head's output, in its unit

    def __post_init__(self) -> None:
        check_figures([self.error, self.embedding_cosine, self.head_error, self.head_difference], -1.0)


Fidelity = ClassFidelity | EmbedFidelity | DenseFidelity
