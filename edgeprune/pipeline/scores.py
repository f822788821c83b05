"""Fidelity of schedules on the search pictures; each is evaluated once and kept in the work folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from edgeprune.io import read_bytes, write_bytes
from edgeprune.pipeline.context import Context
from edgeprune.records import Candidate, Fidelity, Staircase
from edgeprune.scheduling.goals import candidate_of
from edgeprune.tasks import points_from

if TYPE_CHECKING:
    from edgeprune.distributed.evaluate import SpreadEvaluator
    from edgeprune.vit.fidelity import Evaluator

SAVE_EVERY = 8  # scores


class ScheduleScores:
    """Fidelity of the schedules of one context; saved, so that an interrupted search can resume."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.path = context.target.work.file("scores", ".json", *self.key)
        self.known: dict[str, Fidelity] = {}
        if self.path.exists():
            try:
                self.known = msgspec.json.decode(read_bytes(self.path), type=dict[str, Fidelity])
            except msgspec.DecodeError:
                self.known = {}
        self._unsaved = 0

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that a score depends on besides the tokens."""
        context = self.context
        pictures = context.pictures.key if context.pictures else ""
        model, count = context.model, context.options.search_images
        head = (context.judged_by,) if context.judged_by else ()
        parts = (model.vit, model.task, context.method, context.prefix_last, pictures, count, model.preprocessing)
        return (*parts, *head)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Created for the first schedule whose score is not known. Raises InputError without pictures."""
        from edgeprune.vit.fidelity import Evaluator

        context, pictures = self.context, self.context.needed_pictures()
        pixels, labels = pictures.pixels[pictures.search], pictures.labels(pictures.search)
        return Evaluator(context.model, context.method, pixels, labels, context.prefix_last, context.task)

    def release(self) -> None:
        """Free the activations that `evaluator` keeps; it is created again where it is needed."""
        self.__dict__.pop("evaluator", None)

    @cached_property
    def spread(self) -> SpreadEvaluator:
        """As `evaluator`, for a cluster. Raises InputError without pictures, HostError."""
        from edgeprune.distributed.evaluate import SpreadEvaluator

        context, pictures = self.context, self.context.needed_pictures()
        pixels, labels = pictures.pixels[pictures.search], pictures.labels(pictures.search)
        return SpreadEvaluator(context.model, context.method, pixels, labels, context.prefix_last, context.task)

    def ahead(self, schedules: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        """Evaluate schedules, each with its base, together where a cluster does so; elsewhere each in its turn.

        Raises InputError without pictures, HostError, OutputError.
        """
        if self.context.options.cluster is None:
            return
        todo = {pair[0]: pair for pair in schedules if _key(pair[0]) not in self.known}
        try:
            found = self.spread.fidelities(list(todo.values()), self.context.progress) if todo else iter(())
            for tokens, fidelity in found:
                self._keep(tokens, fidelity)
        finally:
            self.save()

    def of(self, tokens: tuple[int, ...], base: tuple[int, ...]) -> Fidelity:
        """Fidelity of a schedule; `base` is the one it was derived from, whose activations it shares.

        Raises InputError without pictures, OutputError.
        """
        self.ahead([(tokens, base)])
        if (key := _key(tokens)) not in self.known:
            self.evaluator.base(base)
            self._keep(tokens, self.evaluator.fidelity(tokens))
        return self.known[key]

    def _keep(self, tokens: tuple[int, ...], found: Fidelity) -> None:
        self.known[_key(tokens)] = found
        self._unsaved += 1
        if self._unsaved >= SAVE_EVERY:
            self.save()

    def candidate(self, staircase: Staircase, tokens: tuple[int, ...]) -> Candidate:
        """A schedule with its prediction and fidelity."""
        score = self.of(tokens, tokens)
        self.save()
        return candidate_of(staircase, self.context.method, self.context.prefix_last, tokens, score)

    def save(self) -> None:
        """Write the known scores. Raises OutputError."""
        if self._unsaved:
            write_bytes(self.path, msgspec.json.encode(self.known))
            self._unsaved = 0

    def accuracy_of_random(self, tokens: int) -> float:
        """A(n), percent: top-1 with n random tokens, agreement without labels (arXiv 2407.05941, sec. 3)."""
        score = self.evaluator.fidelity_of_random(tokens)
        accuracy = score.agreement if score.top1 is None else score.top1
        assert accuracy is not None
        return accuracy

    def drop(self, tokens: tuple[int, ...]) -> float:
        """Points of top-1 that a schedule loses on the search pictures; points of agreement without labels."""
        dense = self.context.dense_tokens
        whole, found = self.of(dense, dense), self.of(tokens, tokens)
        lost = points_from(whole.top1, found.top1, found.agreement)
        assert lost is not None  # dense features, which have neither, are refused with this goal
        return lost


def _key(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))
