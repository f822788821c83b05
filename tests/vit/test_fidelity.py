"""Fidelity: reused blocks give what a run from scratch gives, and figures mean what they say."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeprune.images import normalise
from edgeprune.records import ClassFidelity
from edgeprune.tasks import CLASSIFY
from edgeprune.vit import fidelity
from edgeprune.vit.fidelity import Evaluator, logits_of_schedule, pruned_module

DENSE = (17, 17, 17)
SCHEDULES = [DENSE, (17, 17, 9), (17, 9, 9), (17, 12, 5), (12, 12, 5), (12, 9, 9), (3, 3, 3)]


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """More than two chunks of pictures."""
    return np.random.default_rng(0).integers(0, 256, (2 * fidelity.CHUNK + 5, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Any]) -> Any:
    return tiny("cls")


@pytest.mark.parametrize("method", ["pomt", "fold"])
def test_any_base_gives_the_logits_of_a_run_from_scratch(method: str, model: Any, pixels: NDArray[np.uint8]) -> None:
    wanted = {t: logits_of_schedule(model, method, t, pixels) for t in SCHEDULES}
    evaluator = Evaluator(model, method, pixels)
    for base in [None, *SCHEDULES, *SCHEDULES[::-1]]:
        if base is not None:
            np.testing.assert_allclose(evaluator.base(base), wanted[base], atol=1e-6)
        for tokens in SCHEDULES:
            np.testing.assert_allclose(evaluator.logits(tokens), wanted[tokens], atol=1e-6)
    early = [wanted[t] for t in SCHEDULES if t != (17, 17, 9)]  # CLS never sees a cut in the last block
    assert all(np.abs(a - b).max() > 1e-4 for a, b in combinations(early, 2))


def test_only_blocks_after_the_base_run_again(
    model: Any, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, ran = Evaluator(model, "pomt", pixels[:4]), []
    step = fidelity.step

    def counted(*args: Any) -> Any:
        ran.append(args[3])
        return step(*args)

    monkeypatch.setattr(fidelity, "step", counted)
    for base, tokens, blocks in [
        (DENSE, DENSE, []),
        (DENSE, (17, 17, 9), [9]),
        (DENSE, (12, 9, 9), [12, 9, 9]),
        ((17, 9, 9), (17, 9, 5), [5]),
        ((17, 9, 5), (17, 12, 5), [12, 5]),
    ]:
        evaluator.base(base)
        ran.clear()
        evaluator.logits(tokens)
        assert ran == blocks


@pytest.mark.parametrize("method", ["pomt", "fold"])
def test_last_block_for_the_prefix_alone(method: str, model: Any, pixels: NDArray[np.uint8]) -> None:
    evaluator = Evaluator(model, method, pixels, prefix_last=True)
    for tokens in (DENSE, (17, 9, 9), (9, 5, 5)):
        wanted = logits_of_schedule(model, method, tokens, pixels)
        np.testing.assert_allclose(evaluator.logits(tokens), wanted, atol=1e-5)
        np.testing.assert_allclose(evaluator.base(tokens), wanted, atol=1e-5)
        np.testing.assert_allclose(logits_of_schedule(model, method, tokens, pixels, True), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="a last block that computes only the prefix"):
        evaluator.logits((17, 17, 9))


def test_dense_loses_nothing(model: Any, pixels: NDArray[np.uint8]) -> None:
    import torch

    evaluator = Evaluator(model, "pomt", pixels)
    with torch.inference_mode():
        timm = model.module(torch.from_numpy(normalise(pixels, model.preprocessing))).numpy()
    np.testing.assert_allclose(evaluator.dense_logits, timm, atol=1e-5)
    assert evaluator.fidelity(DENSE) == ClassFidelity(kl=0.0, agreement=100.0)
    lost = evaluator.fidelity((3, 3, 3))
    assert lost.kl > 0.001 and lost.agreement < 100


def test_figures_follow_from_the_logits(model: Any, pixels: NDArray[np.uint8]) -> None:
    dense = logits_of_schedule(model, "topk", DENSE, pixels)
    pruned = logits_of_schedule(model, "topk", (9, 5, 3), pixels)
    labels = [int(n) for n in dense.argmax(1)]
    labels[:10] = [(n + 1) % 7 for n in labels[:10]]
    found = Evaluator(model, "topk", pixels, labels).fidelity((9, 5, 3))
    assert found.agreement == pytest.approx(100 * np.mean(dense.argmax(1) == pruned.argmax(1)))
    assert found.top1 == pytest.approx(100 * np.mean([p.argmax() == n for p, n in zip(pruned, labels, strict=True)]))
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(1, keepdims=True) for x in (dense, pruned))
    assert found.kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-5)


def test_measures_by_hand() -> None:
    dense = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], np.float32))
    pruned = np.log(np.array([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]], np.float32)) + 7
    found = CLASSIFY.fidelity(dense, pruned, [0, 0])
    assert found.kl == pytest.approx((0.25 * np.log(2)) / 2, rel=1e-5)
    assert (found.agreement, found.top1) == (50, 0)
    assert CLASSIFY.fidelity(dense, dense, [0, 0]) == ClassFidelity(kl=0, agreement=100, top1=50)
    huge = np.array([[1e4, 0, 0]], np.float32)
    assert CLASSIFY.fidelity(huge, huge, None).kl == 0


def test_random_choice_of_all_tokens_is_the_unpruned_model(model: Any, pixels: NDArray[np.uint8]) -> None:
    evaluator = Evaluator(model, "pomt", pixels, [0] * len(pixels))
    found = evaluator.fidelity_of_random(17)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 100
    assert found.top1 == evaluator.fidelity(DENSE).top1
    few = evaluator.fidelity_of_random(5)
    assert few.kl > 0.001
    assert few == evaluator.fidelity_of_random(5), "seeded"


def test_pruned_module_is_in_eval_mode(model: Any) -> None:
    assert not pruned_module(model, "pomt", (17, 9, 9)).training
