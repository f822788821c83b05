"""The figures of a build, and how its weights were tuned."""

from __future__ import annotations

from edgeprune.records.base import Record, check_figures, check_task
from edgeprune.records.fidelity import DenseFidelity, Fidelity
from edgeprune.records.latency import Latency


class Unrecovered(Record, frozen=True, kw_only=True):
    """Figures of the same schedule with the original weights, on the same pictures as those of the report.

    Each error is the standard error of the mean change by recovery, paired by picture, in the unit of its figure.
    KL is of classes, cosine of embeddings, error of dense features, for which `features` has all figures.
    """

    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    top1: float | None = None
    error: float | None = None
    agreement_error: float | None = None
    kl_error: float | None = None
    cosine_error: float | None = None
    top1_error: float | None = None
    error_error: float | None = None
    features: DenseFidelity | None = None

    def __post_init__(self) -> None:
        check_figures([self.agreement, self.kl, self.cosine, self.top1, self.error], -1.0)
        check_figures(
            [self.agreement_error, self.kl_error, self.cosine_error, self.top1_error, self.error_error], 0.0
        )


class Report(Record, frozen=True, kw_only=True):
    """Measured figures: latency in ms, top-1 and agreement in percent, KL in nats; None where unknown.

    Of embeddings, top-1 is that of k nearest neighbours, agreement that of the nearest neighbour, and KL is None. Of
    dense features all four are None.
    """

    latency: Latency
    dense_latency: Latency | None = None
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    agreement: float | None = None
    kl: float | None = None
    top1: float | None = None
    dense_top1: float | None = None
    fidelity: Fidelity | None = None  # all figures of the task; None without pictures
    images: int = 0
    held_out: bool | None = None  # figures are of pictures used for nothing but to judge precisions; None: unknown
    probes: int = 0
    predicted_ms: float | None = None
    fusable_attention: int | None = None  # attention layers in the form that TensorRT fuses
    fused_attention: int | None = None  # those that the engine runs as one kernel; None: unknown
    unrecovered: Unrecovered | None = None  # None where the weights were not tuned

    def __post_init__(self) -> None:
        check_figures([self.speedup, *(self.speedup_interval or ()), self.predicted_ms])
        check_figures([self.agreement, self.kl, self.top1, self.dense_top1, self.images, self.probes], -1.0)


class Recovery(Record, frozen=True, kw_only=True):
    """How the weights of a pruned model were tuned to the unpruned one (vit/recovery.py).

    The loss is the KL in nats, 1 - cosine of embeddings, or the squared relative error of dense features.
    """

    task: str = "classify"
    images: int  # pictures that were used, those held out to choose the best state included
    validation_images: int  # of these, never trained on: all losses here are on them
    epochs: int  # of the state that was kept; 0: none was better, the weights are the original ones
    kl_before: float | None = None  # of classes alone
    kl_after: float | None = None
    curve: tuple[float, ...]  # loss before the first epoch and after each
    rate: float  # largest learning rate
    fake_int8: bool = False  # were linear layers computed with the rounding of INT8?
    seed: int
    weights_sha256: str  # of the kept weights

    def __post_init__(self) -> None:
        check_figures([self.kl_before, self.kl_after, *self.curve], -1.0)
        check_figures([self.images, self.validation_images], 1.0)
        check_task(self.task)
        if not 0 <= self.epochs < len(self.curve):
            raise ValueError("the curve needs a loss for every epoch")


class PrecisionResult(Record, frozen=True, kw_only=True):
    """A precision that `--precision auto` tried; figures as in Report, None where unknown."""

    precision: str
    latency: Latency | None = None  # of the pruned model; all of one build were timed together
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    error: float | None = None  # of dense features
    accepted: bool = False
    reason: str | None = None  # why it was not chosen
