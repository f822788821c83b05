"""Reducers against slow references written from the papers' descriptions, loop by loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.attention import BODY, PREFIXES, WIDTH, attended, sizes_of

from edgeprune.defaults import METHODS, REDUCERS
from edgeprune.errors import InputError
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.tokens import Attended

KEEPS = (1, 2, 7, BODY - 1)  # beyond the prefix; the unpruned count never reaches a reducer
Array = NDArray[np.float64]
Reference = Callable[[Array, Array, Array, int, int], tuple[Array, Array]]


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


def pomt_score(weights: Array, values: Array, prefix: int) -> list[float]:
    """Attention that a token receives over the largest of its image, and softmax of its values."""
    heads, count, channels = values.shape
    received, magnitude = [], []
    for token in range(prefix, count):
        received.append(sum(max(weights[h, q, token] for h in range(heads)) for q in range(count)))
        magnitude.append(sum(max(values[h, token, c] for h in range(heads)) for c in range(channels)))
    total = sum(np.exp(m) for m in magnitude)
    return [r / max(received) + np.exp(m) / total for r, m in zip(received, magnitude, strict=True)]


def pomt(x: Array, weights: Array, values: Array, keep: int, prefix: int) -> tuple[Array, Array]:
    """One place goes to the plain mean of the others."""
    kept, rest = split(pomt_score(weights, values, prefix), keep - prefix - 1)
    return x[prefix:][kept], np.mean([x[prefix + token] for token in rest], axis=0)[None]


def weighted_mean(x: Array, sizes: Array, members: list[int]) -> Array:
    """The mean of some tokens, each weighing as much as it stands for."""
    mean: Array = sum(sizes[m] * x[m] for m in members) / sum(sizes[m] for m in members)
    return mean


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (a @ a * (b @ b)) ** 0.5)


def fold(x: Array, weights: Array, keep: int, prefix: int, sizes: Array) -> tuple[Array, Array]:
    """Kept are tokens that CLS and the mean token attend to and that are far from all that are attended to more.

    They take in every other, each the one most like it.
    """
    heads, count, _ = weights.shape
    received = []
    for token in range(prefix, count):
        every = sum(weights[h, q, token] for h in range(heads) for q in range(count)) / count
        received.append(every + (sum(weights[h, 0, token] for h in range(heads)) if prefix else 0.0))
    score = []
    for token, attention in enumerate(received):
        likeness = [cosine(x[prefix + token], x[prefix + o]) for o, a in enumerate(received) if a > attention]
        score.append(attention * (1 - max(0.0, *likeness, 0.0)))
    kept, rest = split(score, keep - prefix)
    groups = {token: [prefix + token] for token in kept}
    for token in rest:
        closest = max(kept, key=lambda other: cosine(x[prefix + token], x[prefix + other]))
        groups[closest].append(prefix + token)
    return in_groups(x, sizes, list(groups.values()))


def tome(x: Array, keys: Array, keep: int, prefix: int, sizes: Array) -> tuple[Array, Array]:
    """One round: every second token looks for its like among the others; the most alike pairs are merged."""
    metric = keys.mean(axis=0)
    stay, move = list(range(prefix, len(x), 2)), list(range(prefix + 1, len(x), 2))
    closest = {m: max(stay, key=lambda s: cosine(metric[m], metric[s])) for m in move}
    ranked = sorted(move, key=lambda m: -cosine(metric[m], metric[closest[m]]))
    merged = ranked[: len(x) - keep]
    groups = {s: [s] for s in stay} | {m: [m] for m in move if m not in merged}
    for m in merged:
        groups[closest[m]].append(m)
    return in_groups(x, sizes, list(groups.values()))


def in_groups(x: Array, sizes: Array, groups: list[list[int]]) -> tuple[Array, Array]:
    """One token a group, and how many it stands for."""
    means = [weighted_mean(x, sizes, members) for members in groups]
    return np.array(means), np.array([sum(sizes[m] for m in members) for members in groups])


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
            found, sizes, _ = reducer(given.out, None, given, keep, prefix)
            assert found.shape == (batch, keep, WIDTH) and sizes is None
            assert torch.equal(found[:, :prefix], given.out[:, :prefix])
            for image in range(batch):
                x, weights, values = (t[image].double().numpy() for t in (given.out, given.weights, given.values))
                kept, fused = REFERENCES[method](x, weights, values, keep, prefix)
                body = found[image, prefix:].double().numpy()
                ends = len(body) - len(fused)
                np.testing.assert_allclose(by_first_channel(body[:ends]), by_first_channel(kept), atol=1e-5)
                np.testing.assert_allclose(body[ends:], fused, atol=1e-5)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", ["fold", "tome"])
def test_merging_equals_the_reference(method: str, prefix: int, sized: bool) -> None:
    reducer = reducer_named(method)
    assert reducer is not None
    for batch in (1, 3):
        given, sizes = attended(batch, prefix), sizes_of(batch, prefix)
        for keep in (prefix + more for more in KEEPS if method == "fold" or more >= BODY // 2):
            found, new_sizes, _ = reducer(given.out, sizes if sized else None, given, keep, prefix)
            assert new_sizes is not None
            assert torch.equal(found[:, :prefix], given.out[:, :prefix])
            for image in range(batch):
                x, weights, keys = (t[image].double().numpy() for t in (given.out, given.weights, given.keys))
                mass = sizes[image].double().numpy() if sized else np.ones(len(x))
                if method == "fold":
                    body, body_mass = fold(x, weights, keep, prefix, mass)
                else:
                    body, body_mass = tome(x, keys, keep, prefix, mass)
                wanted = np.column_stack([body, body_mass])
                got = np.column_stack([found[image, prefix:], new_sizes[image, prefix:]])
                np.testing.assert_allclose(by_first_channel(got), by_first_channel(wanted), atol=1e-5)
                np.testing.assert_array_equal(new_sizes[image, :prefix], mass[:prefix])


@pytest.mark.parametrize("method", ["fold", "tome"])
def test_merging_throws_nothing_away_however_deep_the_cut(method: str) -> None:
    reducer = reducer_named(method)
    assert reducer is not None
    for prefix in PREFIXES:
        given, sizes = attended(3, prefix), sizes_of(3, prefix)
        for keep in range(prefix + 1, prefix + BODY):
            found, new_sizes, _ = reducer(given.out, sizes, given, keep, prefix)
            assert found.shape == (3, keep, WIDTH) and new_sizes is not None and new_sizes.shape == (3, keep)
            torch.testing.assert_close(new_sizes.sum(1), sizes.sum(1))
            before, after = (given.out * sizes[..., None]).sum(1), (found * new_sizes[..., None]).sum(1)
            torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", REDUCERS)
def test_an_image_does_not_depend_on_its_batch_mates(method: str, prefix: int) -> None:
    reducer = reducer_named(method)
    assert reducer is not None
    for seed in range(5):
        given = attended(4, prefix, seed=seed)
        together, sizes, _ = reducer(given.out, None, given, prefix + 7, prefix)
        assert together.shape == (4, prefix + 7, WIDTH)
        for image in range(4):
            alone = Attended(*(t[image : image + 1] for t in given))
            single, single_sizes, _ = reducer(alone.out, None, alone, prefix + 7, prefix)
            torch.testing.assert_close(together[image], single[0], atol=1e-6, rtol=0)
            if sizes is not None and single_sizes is not None:
                assert torch.equal(sizes[image], single_sizes[0])


def test_evit_stays_exact_where_hardly_any_attention_is_left() -> None:
    given = attended(3, 1, sharp=4.0)
    reducer = reducer_named("evit")
    assert reducer is not None
    found, _, _ = reducer(given.out, None, given, BODY, 1)
    for image in range(3):
        x, weights, values = (t[image].double().numpy() for t in (given.out, given.weights, given.values))
        _, fused = evit(x, weights, values, BODY, 1)
        np.testing.assert_allclose(found[image, -1:].numpy(), fused, atol=1e-4)


def test_names() -> None:
    assert reducer_named("none") is None
    assert {*REFERENCES, "fold", "tome", "none"} == set(METHODS)
    with pytest.raises(InputError, match=r"unknown method 'best': choose from fold, .*none"):
        reducer_named("best")
