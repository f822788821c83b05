"""Which token holds which patch: the shares give back what a reducer leaves, over one cut and over several."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.attention import BODY, PREFIXES, attended, sizes_of

from edgeprune.defaults import REDUCERS
from edgeprune.records import Schedule
from edgeprune.vit.pruned import PrunedViT
from edgeprune.vit.reducers import reducer_named
from edgeprune.vit.token_groups import Watched, groups_of, samples_of, shares, small

MERGING = ("fold", "tome")  # they alone know sizes and throw nothing away
LOSING = ("topk",)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", REDUCERS)
def test_shares_give_back_what_the_reducer_leaves(method: str, prefix: int) -> None:
    reducer = reducer_named(method)
    assert reducer is not None
    given = attended(3, prefix)
    for sizes in (None, sizes_of(3, prefix)) if method in MERGING else (None,):
        for keep in (prefix + 2, prefix + 7, prefix + BODY - 1):
            left, left_sizes, _ = reducer(given.out, sizes, given, keep, prefix)
            found = shares(reducer, given.out, sizes, given, keep, prefix)
            assert found.shape == (3, keep, prefix + BODY)
            torch.testing.assert_close(found @ given.out, left, atol=1e-5, rtol=1e-5)
            into = (found > 0).sum(dim=1)  # the tokens that one token went into
            assert torch.equal(into, into.clamp(max=1)) and bool((into == 1).all()) == (method not in LOSING)
            if left_sizes is not None:  # the members of a group weigh as much as they stand for
                mass = torch.ones_like(found[:, 0]) if sizes is None else sizes
                torch.testing.assert_close(found, (found > 0) * mass[:, None] / left_sizes[..., None])


@pytest.mark.parametrize("method", REDUCERS)
def test_watching_changes_nothing(tiny: Callable[..., Any], method: str) -> None:
    model = tiny("cls", depth=4)
    schedule = Schedule(vit=model.vit, method=method, policy="search", tokens=(17, 11, 5, 5))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reducer = reducer_named(method)
    with torch.no_grad():
        wanted = PrunedViT(model.module, model.family, model.vit, schedule.tokens, reducer)(images)
        groups, logits = groups_of(model, schedule, images)
    np.testing.assert_array_equal(logits, wanted.numpy())
    assert [g.shape for g in groups] == [(2, 16), (2, 16)]


@pytest.mark.parametrize("kind", ["cls", "distilled", "gap", "dinov3"])
@pytest.mark.parametrize("method", REDUCERS)
def test_groups_follow_patches_through_several_cuts(tiny: Callable[..., Any], method: str, kind: str) -> None:
    model = tiny(kind, depth=4)
    prefix, whole = model.vit.prefix, model.vit.tokens
    tokens = (whole - 4, whole - 4, prefix + 5, prefix + 5)
    schedule = Schedule(vit=model.vit, method=method, policy="search", tokens=tokens)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reducer = reducer_named(method)
    assert reducer is not None
    watched, masses = Watched(reducer), []

    def noted(*given: Any) -> Any:
        left = watched(*given)
        masses.append(left.sizes)
        return left

    with torch.no_grad():
        groups, _ = groups_of(model, schedule, images)
        PrunedViT(model.module, model.family, model.vit, tokens, noted)(images)
    for cut, left, mass in zip(groups, (whole - 4, prefix + 5), masses, strict=True):
        for image in range(3):
            held = cut[image].tolist()
            kept = {place for place in held if place >= 0}
            assert kept == set(range(prefix, left))  # every token that is left holds a patch, no prefix token does
            assert (-1 in held) == (method in LOSING)
            if mass is not None:  # as many patches as the reducer itself has counted
                assert [held.count(place) for place in sorted(kept)] == mass[image, prefix:].round().int().tolist()
    once, twice = groups[0][0].tolist(), groups[1][0].tolist()
    for a, b in zip(range(16), range(1, 16), strict=False):
        assert once[a] != once[b] or twice[a] == twice[b]  # what shares a token never parts


def test_samples_are_small_pictures_with_names(tiny: Callable[..., Any]) -> None:
    model = tiny("cls", depth=4)
    schedule = Schedule(vit=model.vit, method="fold", policy="search", tokens=(17, 11, 11, 11), prefix_last=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    names = [f"class {k}" for k in range(7)]
    labelled = samples_of(model, schedule, pixels, [3, 5], names)
    assert [sample.label for sample in labelled] == ["class 3", "class 5"]
    assert {s.unpruned for s in labelled} | {s.pruned for s in labelled} <= set(names)
    assert [len(sample.groups) for sample in labelled] == [1, 1]
    for sample, wanted in zip(labelled, pixels, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample.picture))), wanted)
    assert [sample.label for sample in samples_of(model, schedule, pixels, None, names)] == [None, None]


def test_large_pictures_are_made_small() -> None:
    found = Image.open(io.BytesIO(small(np.zeros((448, 448, 3), np.uint8))))
    assert (found.format, found.size) == ("JPEG", (224, 224))
