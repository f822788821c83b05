"""Self-distillation of a pruned model: it gains, it never loses, and an interruption changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.processes import die, fork, shallow_vit
from torch import Tensor

from edgeprune import stats, zoo
from edgeprune.errors import InputError
from edgeprune.features import with_layers
from edgeprune.images import load_images, load_pixels, normalise
from edgeprune.io import sha256_bytes
from edgeprune.onnx_graph.int8 import Int8Layer
from edgeprune.vit import distillation, recovery
from edgeprune.vit.augmentation import Augmentation, augmented
from edgeprune.vit.distillation import divergence
from edgeprune.vit.fake_int8 import FakeInt8
from edgeprune.vit.fidelity import logits_of_schedule, pruned_module
from edgeprune.vit.models import load_model, weights_sha256
from edgeprune.vit.pruned import PrunedViT, flattened
from edgeprune.vit.recovery import Recipe, rate_at, recovered
from edgeprune.vit.recovery_files import load_recovered, save_recovered
from edgeprune.vit.reducers import reducer_named

TOKENS = (20, 5)
QUICK = Recipe(epochs=4, least_steps=0, rate=3e-4, batch=8, warmup=2, patience=1)


@cache
def digits_model() -> Any:
    """The first two blocks of the embedded model, which classify 82 % of the digits."""
    return load_model(shallow_vit())


@cache
def pictures(count: int = 48) -> NDArray[np.uint8]:
    """Digits, (count, 28, 28, 3)."""
    return load_pixels(load_images(zoo.images_dir() / "labels.csv").paths[:count], digits_model().preprocessing)


def run(recipe: Recipe = QUICK, method: str = "topk", **options: Any) -> recovery.Tuned:
    model = digits_model()
    return recovered(pruned_module(model, method, TOKENS), pictures(), model.preprocessing, recipe, **options)


def same(one: recovery.Tuned, other: recovery.Tuned) -> bool:
    """Equal records, which name the hash of the weights."""
    return one.record == other.record


def test_a_pruned_model_comes_closer_to_the_unpruned_one() -> None:
    model = digits_model()
    before = weights_sha256(model.module)
    found = run()
    record = found.record
    assert record.epochs and record.kl_after < 0.8 * record.kl_before
    assert weights_sha256(model.module) == before != record.weights_sha256 == weights_sha256(found.module.model)
    assert (record.images, record.validation_images) == (48, 12)
    order = np.random.default_rng(QUICK.seed).permutation(48)
    held = pictures()[np.sort(order[:12])]
    dense = logits_of_schedule(model, "none", (model.vit.tokens,) * 2, held)
    with torch.no_grad():
        after = found.module(torch.from_numpy(normalise(held, model.preprocessing))).numpy()
    pruned = logits_of_schedule(model, "topk", TOKENS, held)
    assert record.kl_before == record.curve[0] == pytest.approx(stats.kl_per_image(dense, pruned).mean(), rel=1e-4)
    assert record.kl_after == min(record.curve) == pytest.approx(stats.kl_per_image(dense, after).mean(), rel=1e-4)


def test_dense_features_come_closer() -> None:
    """Features of two layers and the embedding, side by side; the loss is that of `distillation.squared_error`."""
    model = digits_model()
    vit = with_layers(model.vit, (1, 2))
    pruned = PrunedViT(model.module, model.family, vit, TOKENS, reducer_named("fold")).eval()
    found = recovered(pruned, pictures(), model.preprocessing, replace(QUICK, rate=2e-3), task="dense")
    record = found.record
    assert record.rate == pytest.approx(2e-3 * (record.curve[0] / recovery.FAR["dense"]) ** 0.5)
    assert record.epochs and min(record.curve) < 0.98 * record.curve[0] and record.kl_after is None
    images = torch.from_numpy(normalise(pictures()[:3], model.preprocessing))
    with torch.no_grad():
        outputs, _ = distillation.traced(found.module, distillation.stream_before(found.module, 0, images))
        torch.testing.assert_close(outputs, flattened(found.module(images)))


def test_held_out_pictures_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def watched(pixels: NDArray[np.uint8], *rest: Any) -> Tensor:
        seen.extend(picture.tobytes() for picture in pixels)
        return augmented(pixels, *rest)

    monkeypatch.setattr(recovery, "augmented", watched)
    record = run().record
    order = np.random.default_rng(QUICK.seed).permutation(48)
    assert set(seen) == {pictures()[i].tobytes() for i in order[12:]}
    assert len(seen) == 36 * (len(record.curve) - 1)


def test_weights_stay_where_nothing_is_better() -> None:
    found = run(replace(QUICK, epochs=6, rate=100.0, warmup=0, average=0, patience=1 / 3))
    assert found.record.epochs == 0 and found.record.kl_after == found.record.kl_before
    assert len(found.record.curve) == 3, "it stops when two epochs were not better"
    assert found.record.weights_sha256 == weights_sha256(digits_model().module)


def test_the_seed_decides() -> None:
    first = run()
    torch.manual_seed(7)
    np.random.seed(7)
    assert same(first, run())
    assert not same(first, run(replace(QUICK, seed=1)))


def dies_in_epoch_3(checkpoint: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if "epoch 3 of 4" in what and done % 5 == 2:
            die()

    run(checkpoint=checkpoint, progress=progress)


def test_kill_9_and_ctrl_c_change_nothing(tmp_path: Path) -> None:
    """Both continue after the last whole epoch, and end with the weights of a run that was left alone."""
    checkpoint = tmp_path / "checkpoint"
    alone = run()

    def interrupt(what: str, done: int, total: int) -> None:
        if "epoch 2 of 4" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=checkpoint, progress=interrupt)
    process = fork(dies_in_epoch_3, checkpoint)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    seen: list[str] = []
    again = run(checkpoint=checkpoint, progress=lambda what, done, total: seen.append(what))
    assert same(alone, again)
    assert "epoch 3 of 4" in seen[0] and not list(tmp_path.glob(".*.tmp"))


def test_a_model_that_is_close_already_is_tuned_at_a_lower_rate() -> None:
    record = run(replace(QUICK, epochs=1)).record
    assert record.kl_before < recovery.FAR["classify"]
    assert record.rate == pytest.approx(QUICK.rate * (record.kl_before / recovery.FAR["classify"]) ** 0.5)


def test_few_pictures_get_more_epochs() -> None:
    """36 pictures in batches of 8 are 5 steps an epoch."""
    assert len(run(replace(QUICK, least_steps=26)).record.curve) == 1 + 6


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    run(replace(QUICK, epochs=1), checkpoint=checkpoint)
    with pytest.raises(InputError, match="of another recovery: remove it"):
        run(replace(QUICK, epochs=1, seed=1), checkpoint=checkpoint)
    with pytest.raises(InputError, match="of another recovery: remove it"):
        run(replace(QUICK, epochs=1), checkpoint=checkpoint, method="pomt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"not a recovery checkpoint \(\w+\): remove it"):
        run(checkpoint=checkpoint)


def test_a_run_that_diverges_keeps_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a KL that is no number gets in the way."""
    real, calls = distillation.divergence, []

    def broken(*logits: Tensor, **options: Any) -> Tensor:
        calls.append(1)
        return real(*logits, **options) * (float("nan") if len(calls) > 1 else 1.0)

    monkeypatch.setitem(distillation.LOSSES, "classify", broken)
    record = run(replace(QUICK, patience=0.25)).record
    assert record.epochs == 0 and record.curve[1] == 100.0 and len(record.curve) == 2


def test_weights_are_tuned_with_the_rounding_of_int8() -> None:
    """The KL is that of the rounded model, which leaves room for it only in training; the unpruned one is exact."""
    model, rough = digits_model(), 60.0  # ranges of activations that are far too large
    weights = [p for name, p in model.module.blocks.named_parameters() if p.ndim == 2]
    layers = [Int8Layer(sha256_bytes(weight.detach().numpy().T.tobytes()), rough) for weight in weights]
    exact, found = run(), run(int8=layers)
    record = found.record
    assert record.fake_int8 and not exact.record.fake_int8
    assert record.kl_before > 1.2 * exact.record.kl_before and record.epochs and record.kl_after < record.kl_before
    held = pictures()[np.sort(np.random.default_rng(QUICK.seed).permutation(48)[:12])]
    images = torch.from_numpy(normalise(held, model.preprocessing))
    dense = logits_of_schedule(model, "none", (model.vit.tokens,) * 2, held)
    pruned = pruned_module(model, "topk", TOKENS)
    with torch.no_grad(), FakeInt8(layers):
        before = pruned(images).numpy()
    assert record.kl_before == pytest.approx(stats.kl_per_image(dense, before).mean(), rel=1e-4)


def test_recovered_weights_as_a_file(tmp_path: Path) -> None:
    model = digits_model()
    found = run()
    save_recovered(found.module.model, found.record, tmp_path / "weights.safetensors")
    loaded, record = load_recovered(model, tmp_path / "weights.safetensors")
    assert record == found.record and weights_sha256(loaded.module) == record.weights_sha256
    assert loaded.vit == model.vit and weights_sha256(model.module) != record.weights_sha256


def test_augmented_pictures() -> None:
    """The same generator gives the same pictures; without crops and mixing, a picture or its mirror image."""
    how, pixels = digits_model().preprocessing, pictures(8)
    first, second = (augmented(pixels, how, np.random.default_rng(5), Augmentation()) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (8, 3, 28, 28)
    assert not torch.equal(first, augmented(pixels, how, np.random.default_rng(6), Augmentation()))
    plain = Augmentation(least_area=1, aspect=1, mixed=0)
    wanted = torch.from_numpy(normalise(pixels, how))
    flipped = 0
    for picture, original in zip(augmented(pixels, how, np.random.default_rng(5), plain), wanted, strict=True):
        mirrored = torch.allclose(picture, original.flip(-1), atol=1e-4)
        assert mirrored or torch.allclose(picture, original, atol=1e-4)
        flipped += mirrored
    assert 0 < flipped < 8


def test_mixed_pictures_lie_between_two() -> None:
    """Black and white pictures mix to greys; a crop of one colour stays that colour."""
    pixels = np.repeat(np.array([0, 255], np.uint8), 8)[:, None, None, None] * np.ones((1, 28, 28, 3), np.uint8)
    how, change = digits_model().preprocessing, Augmentation(mixed=1)
    grey = augmented(pixels, how, np.random.default_rng(0), change)
    levels = grey.amax(dim=(1, 2, 3))
    assert torch.allclose(levels, grey.amin(dim=(1, 2, 3)), atol=1e-4)
    assert ((levels > -0.99) & (levels < 0.99)).any() and levels.abs().max() <= 1.0001


@pytest.mark.parametrize("kind", ["cls", "distilled", "gap"])
def test_prefix_tokens_on_their_way(tiny: Callable[..., Any], kind: str) -> None:
    """The logits are those of the module; all prefix tokens after every block, none where there is no prefix."""
    model = tiny(kind)
    vit, images = model.vit, torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pruned = pruned_module(model, "fold", (vit.tokens, 5, 5), vit.prefix_pooled)
    with torch.no_grad():
        stream = distillation.stream_before(pruned, 0, images)
        logits, passed = distillation.traced(pruned, stream)
        whole, wanted = distillation.traced(recovery.unpruned(pruned), stream)
        assert torch.equal(logits, pruned(images)) and torch.allclose(whole, model.module(images), atol=1e-5)
        later = distillation.stream_before(recovery.unpruned(pruned), 1, images)
        assert torch.equal(distillation.traced(pruned, later, 1)[0], logits)
    assert [p.shape for p in passed] == [(4, vit.prefix, 48)] * (3 if vit.prefix else 0)
    if vit.prefix:
        assert float(distillation.relative_error(wanted, wanted, 3)) == 0
        assert float(distillation.relative_error(wanted, passed, 3)) > 0
        means = [w.mean(dim=0, keepdim=True).expand_as(w) for w in wanted]
        assert float(distillation.relative_error(wanted, means, 3)) == pytest.approx(1)


def test_blocks_before_the_first_cut_stay_as_they_are() -> None:
    """Their tokens are those of the unpruned model, so they are computed once and not tuned."""
    model = load_model(shallow_vit(3))
    pruned = pruned_module(model, "fold", (model.vit.tokens, 5, 5))
    assert recovery.first_cut(pruned) == 1
    before, after = model.module.state_dict(), recovered(pruned, pictures(), model.preprocessing, QUICK).module
    changed = {name for name, value in after.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("blocks.", "norm.", "head.")) for name in changed)
    assert {name[:9] for name in changed if name.startswith("blocks.")} == {"blocks.1.", "blocks.2."}


def test_a_cut_that_changes_nothing() -> None:
    """After the last attention the class token does not see it; rounding may put the KL below 0."""
    model = digits_model()
    found = recovered(pruned_module(model, "fold", (model.vit.tokens, 5)), pictures(), model.preprocessing, QUICK)
    assert abs(found.record.curve[0]) < 1e-6


def test_divergence_is_that_of_the_figures() -> None:
    random = np.random.default_rng(0)
    dense, pruned = (random.standard_normal((5, 7)).astype(np.float32) for _ in range(2))
    found = float(divergence(torch.from_numpy(dense), torch.from_numpy(pruned)))
    assert found == pytest.approx(stats.kl_per_image(dense, pruned).mean(), rel=1e-5)


def test_learning_rate() -> None:
    rates = [rate_at(step, 20, 100) for step in range(100)]
    assert rates[0] == 1 / 20 and max(rates) == rates[20] == 1.0 and 0 < rates[-1] < 0.001
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert max(rate_at(step, 20, 8) for step in range(8)) == 1.0, "a short run has a short warm-up"
