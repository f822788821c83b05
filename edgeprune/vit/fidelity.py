"""Fidelity of schedules to the unpruned model, evaluated in PyTorch; shared first blocks run only once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from edgeprune.images import normalise
from edgeprune.records import Fidelity, Preprocessing, Progress, check_tokens, silent
from edgeprune.tasks import Task, task_of
from edgeprune.vit.models import Model
from edgeprune.vit.pruned import PrunedViT, flattened, random_kept, step
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.restore import features
from edgeprune.vit.rotary import rows_of
from edgeprune.vit.tokens import Stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 16  # images at a time: activations stay in cache
T = TypeVar("T")
R = TypeVar("R")


def one_thread() -> None:
    """Let PyTorch compute with one thread from now on, as everything in `each_chunk` does."""
    torch.set_num_threads(1)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "chunk", initializer=one_thread)


def each_chunk(work: Callable[[T], R], chunks: Sequence[T]) -> list[R]:
    """work() of every chunk of images, in order; several chunks at once, each with one thread.

    How PyTorch splits an operation among threads can change the last bits of its result. With one thread for each
    chunk the outputs of a chunk depend on the chunk alone, not on the number of threads or processes.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(chunk) for chunk in chunks]
    return list(_pool(threads).map(work, chunks))


def pruned_module(model: Model, method: str, tokens: Sequence[int], prefix_last: bool = False) -> PrunedViT:
    """The model with a schedule, in eval mode."""
    reducer = reducer_named(method)
    pruned = PrunedViT(model.module, model.family, model.vit, tokens, reducer, prefix_last)
    return pruned.eval()


def logits_of_schedule(
    model: Model,
    method: str,
    tokens: Sequence[int],
    pixels: NDArray[np.uint8],
    prefix_last: bool = False,
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """PyTorch outputs (images, values) of a schedule for pixels (images, P, P, 3), a few images at a time."""
    return outputs_of(pruned_module(model, method, tokens, prefix_last), pixels, model.preprocessing, progress)


def outputs_of(
    pruned: PrunedViT, pixels: NDArray[np.uint8], how: Preprocessing, progress: Progress = silent
) -> NDArray[np.float32]:
    """Outputs (images, values) of a pruned model for pixels (images, P, P, 3), a few images at a time."""
    what, starts = "evaluating images in PyTorch", range(0, len(pixels), CHUNK)
    device = next(pruned.parameters()).device

    def outputs(start: int) -> NDArray[np.float32]:
        progress(what, start, len(pixels))
        images = torch.from_numpy(normalise(pixels[start : start + CHUNK], how))
        with torch.inference_mode():
            return packed_outputs(pruned(images.to(device)))

    rows = each_chunk(outputs, starts)
    progress(what, len(pixels), len(pixels))
    return np.concatenate(rows)


def packed_outputs(outputs: torch.Tensor | Sequence[torch.Tensor]) -> NDArray[np.float32]:
    """The output of a module, or its several outputs in their order, as one array (images, values)."""
    found: NDArray[np.float32] = flattened(outputs).cpu().numpy()
    return found


class Evaluator:
    """Fidelity of schedules of one model and method on fixed images.

    Keeps the residual streams of the last `base` schedule at the entry of every block, so that a schedule that
    differs from block i on runs only the blocks from i. Memory: depth * images * tokens * width * 4 B.
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
        self.model, self.labels, self.prefix_last = model, labels, prefix_last
        self.task = task or task_of(model.task, model.vit)
        self.reducer = reducer_named(method)
        self._blocks: Any = model.module.blocks
        self._streams: list[list[Stream]] = []  # by chunk, by block
        self._base: tuple[int, ...] = ()
        with torch.inference_mode():
            self._table = model.family.rotary(model.module)
        chunks = [pixels[start : start + CHUNK] for start in range(0, len(pixels), CHUNK)]
        self._embedded = each_chunk(self._embed, chunks)
        dense = (model.vit.tokens,) * model.vit.depth
        self.dense_logits = self.base(dense)

    def base(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Outputs (images, values) of a schedule, whose streams are kept for the next schedules."""
        if tuple(tokens) != self._base:
            shared = self._shared(tokens)
            kept = [streams[: shared + 1] for streams in self._streams] or [[first] for first in self._embedded]
            self._streams, self._base = [], ()  # what is not shared is free before the new streams are made
            self._streams, self._base = each_chunk(lambda streams: self._rest(streams, tokens), kept), tuple(tokens)
        return np.concatenate(each_chunk(self._outputs, self._streams))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Outputs (images, values) of a schedule; the blocks it shares with the base are not run again."""
        check_tokens(tokens, self.model.vit, self.prefix_last)
        shared, layers = self._shared(tokens), self.model.vit.layers

        def outputs(streams: list[Stream]) -> NDArray[np.float32]:
            stream, passed = streams[shared], {layer: streams[layer] for layer in layers if layer <= shared}
            for block in range(shared, self.model.vit.depth):
                stream = self._step(block, stream, tokens[block])
                if block + 1 in layers:
                    passed[block + 1] = stream
            return self._outputs_of(stream, [passed[layer] for layer in layers])

        return np.concatenate(each_chunk(outputs, self._streams))

    def fidelity(self, tokens: Sequence[int]) -> Fidelity:
        """The figures of a schedule."""
        return self.compare(self.logits(tokens))

    def compare(self, logits: NDArray[np.float32]) -> Fidelity:
        """The figures of outputs (images, values)."""
        return self.task.fidelity(self.dense_logits, logits, self.labels)

    def fidelity_of_random(self, tokens: int) -> Fidelity:
        """The estimate A(n) of arXiv 2407.05941, sec. 3: `tokens` random tokens are kept at the input."""
        generator = torch.Generator().manual_seed(0)
        kept = [random_kept(s.x, tokens, self.model.vit.prefix, generator) for s in self._embedded]

        def outputs(stream: Stream) -> NDArray[np.float32]:
            x = stream.x
            with torch.inference_mode():
                for index, block in enumerate(self._blocks):
                    x = self.model.family.block(block, x, None, rows_of(self._table, index, stream.places))
            return self._outputs_of(Stream(x), ())

        return self.compare(np.concatenate(each_chunk(outputs, kept)))

    def _embed(self, pixels: NDArray[np.uint8]) -> Stream:
        with torch.inference_mode():
            images = torch.from_numpy(normalise(pixels, self.model.preprocessing))
            return Stream(self.model.family.embed(self.model.module, images))

    def _rest(self, streams: list[Stream], tokens: Sequence[int]) -> list[Stream]:
        """The streams of one chunk at the entry of every block and at the end, from those of its first blocks."""
        streams = list(streams)
        for block in range(len(streams) - 1, self.model.vit.depth):
            streams.append(self._step(block, streams[-1], tokens[block]))
        return streams

    def _shared(self, tokens: Sequence[int]) -> int:
        count = 0
        while count < len(self._base) and tokens[count] == self._base[count]:
            count += 1
        return count

    def _step(self, block: int, stream: Stream, keep: int) -> Stream:
        model, vit = self.model, self.model.vit
        with torch.inference_mode():
            rows = rows_of(self._table, block, stream.places)
            if self.prefix_last and block == vit.depth - 1:
                x = model.family.prefix_only(self._blocks[block], stream.x, stream.sizes, vit.prefix, rows)
                return Stream(x)
            return step(model.family, self._blocks[block], stream, keep, vit, self.reducer, rows)

    def _outputs(self, streams: Sequence[Stream]) -> NDArray[np.float32]:
        """Of one chunk: its streams at the entry of every block and at the end."""
        return self._outputs_of(streams[-1], [streams[layer] for layer in self.model.vit.layers])

    def _outputs_of(self, last: Stream, passed: Sequence[Stream]) -> NDArray[np.float32]:
        """Of one chunk: its last stream, and its streams after the blocks of Vit.layers."""
        model = self.model
        with torch.inference_mode():
            found = [features(model.family, model.module, model.vit, stream) for stream in passed]
            return packed_outputs([*found, model.family.classify(model.module, last.x, last.sizes)])
