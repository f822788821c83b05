"""Reducers against slow references written from the papers' descriptions, loop by loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeprune.errors import InputError
from edgeprune.reducers import REDUCERS, methods, reducer_named
from edgeprune.tokens import Attended

BODY, HEADS, HEAD_DIM, WIDTH = 14, 3, 4, 6
PREFIXES = (0, 1, 2, 5)
KEEPS = (1, 2, 7, BODY - 1)  # beyond the prefix; the unpruned count never reaches a reducer
Array = NDArray[np.float64]
Reference = Callable[[Array, Array, Array, int, int], tuple[Array, Array]]


def attended(batch: int, prefix: int, sharp: float = 2.0, seed: int = 0) -> Attended:
    """Random tensors; images differ in how sharp their attention and how large their values are."""
    generator = torch.Generator().manual_seed(seed)
    count = prefix + BODY
    scale = torch.linspace(0.5, 1.5, batch)[:, None, None, None]
    logits = torch.randn(batch, HEADS, count, count, generator=generator) * sharp * scale
    keys, values = torch.randn(2, batch, HEADS, count, HEAD_DIM, generator=generator).unbind(0)
    out = torch.randn(batch, count, WIDTH, generator=generator)
    return Attended(out, logits.softmax(dim=-1), keys, values * scale)


def attention_from_first(weights: Array, prefix: int) -> list[float]:
    """Attention of the first token to each body token, or of all tokens where no token is special."""
    heads, count, _ = weights.shape
    queries = [0] if prefix else range(count)
    score = []
    for token in range(prefix, count):
        seen = [weights[head, query, token] for head in range(heads) for query in queries]
        score.append(sum(seen) / len(seen))
    return score


def split(score: list[float], count: int) -> tuple[list[int], list[int]]:
    """Indices of the `count` best, and of the others."""
    ranked = sorted(range(len(score)), key=lambda token: -score[token])
    return ranked[:count], ranked[count:]


def topk(x: Array, weights: Array, values: Array, keep: int, prefix: int) -> tuple[Array, Array]:
    """The tokens that CLS attends to most; the others are dropped."""
    kept, _ = split(attention_from_first(weights, prefix), keep - prefix)
    return x[prefix:][kept], x[:0]


def evit(x: Array, weights: Array, values: Array, keep: int, prefix: int) -> tuple[Array, Array]:
    """One place goes to the mean of the others, each weighing as much as CLS attends to it."""
    score = attention_from_first(weights, prefix)
    kept, rest = split(score, keep - prefix - 1)
    fused = np.zeros(x.shape[1])
    for token in rest:
        fused += score[token] * x[prefix + token] / sum(score[other] for other in rest)
    return x[prefix:][kept], fused[None]


def pomt(x: Array, weights: Array, values: Array, keep: int, prefix: int) -> tuple[Array, Array]:
    """Score: attention received over its maximum, and softmax of the values; one place goes to a plain mean."""
    heads, count, channels = values.shape
    received, magnitude = [], []
    for token in range(prefix, count):
        received.append(sum(max(weights[h, q, token] for h in range(heads)) for q in range(count)))
        magnitude.append(sum(max(values[h, token, c] for h in range(heads)) for c in range(channels)))
    total = sum(np.exp(m) for m in magnitude)
    score = [r / max(received) + np.exp(m) / total for r, m in zip(received, magnitude, strict=True)]
    kept, rest = split(score, keep - prefix - 1)
    return x[prefix:][kept], np.mean([x[prefix + token] for token in rest], axis=0)[None]


REFERENCES: dict[str, Reference] = {"topk": topk, "evit": evit, "pomt": pomt}


def by_first_channel(rows: Array) -> Array:
    """Kept tokens are a set: their order is nobody's promise."""
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", REFERENCES)
def test_equals_the_reference(method: str, prefix: int) -> None:
    reducer = reducer_named(method)
    assert reducer is not None
    for batch in (1, 3):
        given = attended(batch, prefix)
        for keep in (prefix + more for more in KEEPS):
            found, sizes = reducer(given.out, None, given, keep, prefix)
            assert found.shape == (batch, keep, WIDTH) and sizes is None
            assert torch.equal(found[:, :prefix], given.out[:, :prefix])
            for image in range(batch):
                x, weights, values = (t[image].double().numpy() for t in (given.out, given.weights, given.values))
                kept, fused = REFERENCES[method](x, weights, values, keep, prefix)
                body = found[image, prefix:].double().numpy()
                ends = len(body) - len(fused)
                np.testing.assert_allclose(by_first_channel(body[:ends]), by_first_channel(kept), atol=1e-5)
                np.testing.assert_allclose(body[ends:], fused, atol=1e-5)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", REDUCERS)
def test_an_image_does_not_depend_on_its_batch_mates(method: str, prefix: int) -> None:
    reducer = reducer_named(method)
    assert reducer is not None
    for seed in range(5):
        given = attended(4, prefix, seed=seed)
        together, _ = reducer(given.out, None, given, prefix + 7, prefix)
        for image in range(4):
            alone = Attended(*(t[image : image + 1] for t in given))
            single, _ = reducer(alone.out, None, alone, prefix + 7, prefix)
            torch.testing.assert_close(together[image], single[0], atol=1e-6, rtol=0)


def test_evit_stays_exact_where_hardly_any_attention_is_left() -> None:
    given = attended(3, 1, sharp=15.0)
    reducer = reducer_named("evit")
    assert reducer is not None
    found, _ = reducer(given.out, None, given, BODY, 1)
    for image in range(3):
        x, weights, values = (t[image].double().numpy() for t in (given.out, given.weights, given.values))
        _, fused = evit(x, weights, values, BODY, 1)
        np.testing.assert_allclose(found[image, -1:].numpy(), fused, atol=1e-4)


def test_names() -> None:
    assert reducer_named("none") is None
    assert set(REFERENCES) <= set(methods())
    with pytest.raises(InputError, match=r"unknown method 'best': choose from topk, .*none"):
        reducer_named("best")
