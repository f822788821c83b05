"""How a build came to its schedule."""

from __future__ import annotations

from edgeprune.records.base import SCHEMA, Record, check_figures
from edgeprune.records.latency import Latency


class Candidate(Record, frozen=True):
    """A schedule with its predicted latency (ms) and its fidelity on the search pictures, as in Report."""

    tokens: tuple[int, ...]
    predicted_ms: float
    kl: float | None  # of classes
    agreement: float | None
    top1: float | None
    cosine: float | None = None  # of embeddings
    error: float | None = None  # of dense features

    def __post_init__(self) -> None:
        check_figures([self.predicted_ms])
        check_figures([self.kl, self.agreement, self.top1, self.cosine, self.error], -1.0)
        if (self.kl, self.cosine, self.error).count(None) != 2 or (self.agreement is None) != (
            self.error is not None
        ):
            raise ValueError("a candidate has a KL, a cosine or an error, and the first two an agreement")

    @property
    def loss(self) -> float:
        """What the search makes small: KL in nats, 1 - cosine, or the squared relative error."""
        if self.error is not None:
            return self.error**2
        if self.kl is not None:
            return self.kl
        assert self.cosine is not None
        return 1 - self.cosine

    @property
    def accuracy(self) -> float:
        """What the utility of a goal counts: the agreement, of dense features 1 - relative error; percent."""
        if self.agreement is not None:
            return self.agreement
        assert self.error is not None
        return 100 * max(1 - self.error, 0.0)


class Trial(Record, frozen=True, kw_only=True):
    """A schedule that was built, with its predicted and its measured latency."""

    tokens: tuple[int, ...]
    predicted_ms: float
    latency: Latency

    def __post_init__(self) -> None:
        check_figures([self.predicted_ms])


class Sample(Record, frozen=True, kw_only=True):
    """A picture of the evaluation set, and which token holds each patch after every cut."""

    picture: bytes  # a PNG or JPEG file
    label: str | None = None
    unpruned: str | None = None  # class predicted by the unpruned model; None for embeddings
    pruned: str | None = None
    cosine: float | None = None  # to the unpruned embedding; None for classes
    error: float | None = None  # relative error of dense features; None for the others
    groups: tuple[
        tuple[int, ...], ...
    ]  # by cut and patch (row by row): index of the token that holds the patch, -1: none

    def __post_init__(self) -> None:
        if any(len(cut) != len(self.groups[0]) for cut in self.groups):
            raise ValueError("groups need the same number of patches after every cut")


class BuildTrace(Record, frozen=True, kw_only=True):
    """How a build chose its schedule: what it evaluated, what it built, and the effect on a few pictures."""

    schema: int = SCHEMA
    asked: str = ""  # the goal
    candidates: tuple[Candidate, ...] = ()  # empty where nothing was searched
    trials: tuple[Trial, ...] = ()
    samples: tuple[Sample, ...] = ()  # empty without pictures, or where nothing is cut
