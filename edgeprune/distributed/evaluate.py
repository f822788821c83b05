"""Fidelity of schedules by Ray tasks over blocks of pictures; the same bits as in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.distributed.cluster import ray_module, received, stored
from edgeprune.io import key_of, sha256_bytes
from edgeprune.records import Fidelity, Preprocessing, Progress, silent
from edgeprune.runtimes.quiet import evaluating
from edgeprune.scheduling.search import Tokens
from edgeprune.tasks import Task, task_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeprune.vit.fidelity import Evaluator
    from edgeprune.vit.models import Model
    from edgeprune.vit.pruned import PrunedViT

BLOCK = 32  # pictures of a task; a multiple of vit.fidelity.CHUNK, so that chunks are those of one process
GROUP = 8  # schedules of a task, at most: they share the activations of their base
TASKS = 4  # for each CPU, at least, where there are schedules enough: at the end a CPU waits for one of another's
AHEAD = 3  # tasks in flight for each CPU of the cluster
KEPT = 2  # evaluators that a worker keeps: each holds the activations of one block of pictures
Pairs = Sequence[tuple[Tokens, Tokens]]  # schedules, each with the base whose activations it shares


class SpreadEvaluator:
    """Fidelity of schedules of one model and method on fixed images, as vit.fidelity.Evaluator.

    Weights and pictures go to Ray's object store once, and from there once to each node. A task evaluates up
    to GROUP schedules on BLOCK pictures; its rows are put together in the order of the pictures, and the figures are
    computed here. A task whose node is lost runs again elsewhere. Needs a connection to Ray.
    """

    def __init__(
        self,
        model: Model,
        method: str,
        pixels: NDArray[np.uint8],
        labels: Sequence[int] | None = None,
        prefix_last: bool = False,
        task: Task | None = None,
    ) -> None:
        from edgeprune.vit.packing import packed

        self.ray = ray_module()
        self.task, self.labels = task or task_of(model.task, model.vit), labels
        pictures = sha256_bytes(np.ascontiguousarray(pixels).reshape(-1).data)
        self._key = key_of(model.vit, model.preprocessing, model.task, method, prefix_last, pictures)
        self._how = (method, prefix_last)
        self._model = self.ray.put(packed(model, self.ray.cloudpickle.Pickler))
        self._blocks = stored(pixels, BLOCK)
        self._remote = self.ray.remote(num_cpus=1, max_retries=-1)(evaluate)
        dense = (model.vit.tokens,) * model.vit.depth
        [(_, self.dense_logits)] = self.logits([(dense, dense)])

    def fidelities(self, schedules: Pairs, progress: Progress = silent) -> Iterator[tuple[Tokens, Fidelity]]:
        """Schedules with their figures, in order, as they become known. Raises HostError, EdgepruneError."""
        progress("evaluating schedules on Ray", 0, len(schedules))
        for done, (tokens, logits) in enumerate(self.logits(schedules), 1):
            yield tokens, self.task.fidelity(self.dense_logits, logits, self.labels)
            progress("evaluating schedules on Ray", done, len(schedules))

    def logits(self, schedules: Pairs) -> Iterator[tuple[Tokens, NDArray[np.float32]]]:
        """Schedules with their logits (images, classes), in order. Raises HostError, EdgepruneError."""
        cpus = max(int(self.ray.cluster_resources().get("CPU", 1)), 1)
        size = group_size(len(schedules), len(self._blocks), cpus)
        groups = deque(schedules[start : start + size] for start in range(0, len(schedules), size))
        most = AHEAD * cpus
        sent: deque[tuple[Pairs, list[Any]]] = deque()
        try:
            while groups or sent:
                while groups and (not sent or (len(sent) + 1) * len(self._blocks) <= most):
                    sent.append((group := groups.popleft(), [self._send(n, group) for n in range(len(self._blocks))]))
                group, answers = sent.popleft()
                rows = np.concatenate(received(answers), axis=1)
                yield from ((tokens, logits) for (tokens, _), logits in zip(group, rows, strict=True))
        finally:
            for _, answers in sent:  # what an error or Ctrl-C leaves
                for answer in answers:
                    self.ray.cancel(answer)

    def _send(self, block: int, group: Pairs) -> Any:
        return self._remote.remote(f"{self._key}-{block}", [self._model], self._blocks[block], *self._how, group)


def group_size(schedules: int, blocks: int, cpus: int) -> int:
    """Schedules of a task, for so many schedules, blocks of pictures, and CPUs."""
    return max(1, min(GROUP, schedules * blocks // (TASKS * cpus)))


_evaluators: dict[str, Evaluator] = {}  # of this worker, the one used last at the end


def evaluate(
    key: str, model: Sequence[Any], pixels: NDArray[np.uint8], method: str, prefix_last: bool, schedules: Pairs
) -> NDArray[np.float32]:
    """Logits (schedules, images, classes) of a block of pictures (images, P, P, 3), with one thread.

    `key` names model, method, pictures and block; `model` holds a reference to a vit.packing.Packed in the object
    store.
    """
    from edgeprune.vit.fidelity import Evaluator, one_thread
    from edgeprune.vit.packing import unpacked

    one_thread()
    with evaluating():
        evaluator = _evaluators.pop(key, None)
        if evaluator is None:
            loaded = unpacked(ray_module().get(model[0]))
            evaluator = Evaluator(loaded, method, pixels, None, prefix_last)
        _evaluators[key] = evaluator
        while len(_evaluators) > KEPT:
            del _evaluators[next(iter(_evaluators))]
        rows = []
        for tokens, base in schedules:
            evaluator.base(base)
            rows.append(evaluator.logits(tokens))
        return np.stack(rows)


class SpreadOutputs:
    """Outputs of pruned models with ever other weights, as vit.fidelity.outputs_of; needs a connection to Ray."""

    def __init__(self) -> None:
        self.ray = ray_module()
        self._pixels: NDArray[np.uint8] | None = None
        self._blocks: list[Any] = []  # of these pixels, in the object store
        self._remote = self.ray.remote(num_cpus=1, max_retries=-1)(outputs)

    def __call__(self, pruned: PrunedViT, pixels: NDArray[np.uint8], how: Preprocessing) -> NDArray[np.float32]:
        """Outputs (images, values) for pixels (images, P, P, 3). Raises HostError, EdgepruneError."""
        from edgeprune.vit.packing import packed

        if pixels is not self._pixels:
            self._pixels, self._blocks = pixels, stored(pixels, BLOCK)
        model = self.ray.put(packed(pruned, self.ray.cloudpickle.Pickler))
        return np.concatenate(received([self._remote.remote([model], block, how) for block in self._blocks]))


def outputs(model: Sequence[Any], pixels: NDArray[np.uint8], how: Preprocessing) -> NDArray[np.float32]:
    """Outputs (images, values) of a block of pictures (images, P, P, 3), with one thread.

    `model` holds a reference to the vit.packing.Packed of a PrunedViT in the object store.
    """
    from edgeprune.vit.fidelity import one_thread, outputs_of
    from edgeprune.vit.packing import unpacked

    one_thread()
    with evaluating():
        return outputs_of(unpacked(ray_module().get(model[0])), pixels, how)
