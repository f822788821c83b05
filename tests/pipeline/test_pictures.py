"""Which pictures choose a schedule, and which its figures are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builds import few_digits

from edgeprune.errors import InputError
from edgeprune.images import calibration_indices, load_pixels
from edgeprune.pipeline.context import Context, Options, context_for
from edgeprune.pipeline.scores import ScheduleScores
from edgeprune.tasks import points_lost


def context_on(images: Path, tmp_path: Path, **options: Any) -> Context:
    return context_for(Options(images=images, work=tmp_path / "work", **options))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 70 digits."""
    return few_digits(tmp_path_factory.mktemp("digits"), 70)


@pytest.mark.parametrize(
    ("options", "left", "held_out"),
    [
        ({"search_images": 10}, 60, True),
        ({"search_images": 10, "policy": "paper"}, 60, True),
        ({"search_images": 10, "precision": "int8"}, 38, True),  # 32 gave the INT8 ranges
        ({"search_images": 38}, 32, True),
        ({"search_images": 39}, 70, False),
        ({"search_images": 128}, 70, False),
        ({"search_images": 128, "method": "none"}, 70, True),
        ({"method": "none", "precision": "int8"}, 38, True),
    ],
    ids=str,
)
def test_figures_are_of_pictures_that_chose_nothing(
    options: dict[str, Any], left: int, held_out: bool, digits: Path, tmp_path: Path
) -> None:
    context = context_on(digits, tmp_path, **options)
    pictures, precision = context.needed_pictures(), context.target.onnx_precision
    images, good = pictures.held_out(context.method, precision)
    assert (len(images), good) == (left, held_out)
    if good and options.get("method") != "none":
        assert not {*images.tolist()} & {*pictures.search.tolist()}
    if good and options.get("precision") == "int8":
        assert not {*images.tolist()} & {*calibration_indices(70).tolist()}
    assert pictures.held_out("none", precision)[1] is True


@pytest.mark.parametrize("labelled", [True, False])
def test_max_drop_is_judged_on_the_search_pictures(labelled: bool, digits: Path, tmp_path: Path) -> None:
    """Else no picture would be left for the figures. What the search has evaluated is not evaluated again."""
    from edgeprune.vit.fidelity import logits_of_schedule

    context = context_on(digits if labelled else digits.parent / "images", tmp_path, search_images=40)
    pictures, dense, scores = context.needed_pictures(), context.dense_tokens, ScheduleScores(context)
    pixels, labels = pictures.pixels[pictures.search], pictures.labels(pictures.search)
    found = []
    for tokens in ((2,) * 12, (*dense[:6], *(20,) * 6)):
        outputs = [logits_of_schedule(context.model, "fold", t, pixels, context.prefix_last) for t in (dense, tokens)]
        found.append(scores.drop(tokens))
        assert found[-1] == points_lost(context.task, *outputs, labels)[0]
    assert len(set(found)) == 2 and max(found) > 0
    scores.save()
    known = ScheduleScores(context)
    assert known.drop((2,) * 12) == found[0] and "evaluator" not in vars(known)


def test_pixels_are_mapped_and_not_read(digits: Path, tmp_path: Path) -> None:
    """A plain array, which Ray shares, and still the file's own pages; the next process maps the same file."""
    pictures = context_on(digits, tmp_path).needed_pictures()
    pixels = pictures.pixels
    assert type(pixels) is np.ndarray and isinstance(pixels.base, np.memmap) and not pixels.flags.writeable
    np.testing.assert_array_equal(pixels, load_pixels(pictures.files.paths, pictures.how))
    np.testing.assert_array_equal(context_on(digits, tmp_path).needed_pictures().pixels, pixels)


def test_pictures_that_were_tuned_on_give_no_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where few are left, those that chose the schedule do. Only where there are no others all pictures do."""
    digits = few_digits(tmp_path / "digits", 50)
    half = context_on(digits, tmp_path, recover=True, search_images=30).needed_pictures()
    images, good = half.held_out("fold", "fp32")
    assert (len(images), good) == (25, False) and not {*images.tolist()} & {*half.tuned_on.tolist()}
    assert "figures are of all 25 images that weights were not tuned on, including those used to" in caplog.text
    whole = context_on(digits, tmp_path, recover=digits).needed_pictures()
    assert len(whole.held_out("fold", "fp32")[0]) == 50
    assert "figures are of all 50 images, including those used to choose the schedule and to recover" in caplog.text


def test_folders_of_other_classes_give_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digits = sorted((few_digits(tmp_path / "digits", 6).parent / "images").iterdir())
    for index, path in enumerate(digits):
        (folder := tmp_path / "folders" / "abc"[index % 3]).mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    pictures = context_on(tmp_path / "folders", tmp_path).needed_pictures()
    assert pictures.labels(np.arange(6)) is None and "3 class folders for a model with 10 classes" in caplog.text


def test_what_cannot_be_searched_is_refused_before_anything_is_measured(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    with pytest.raises(InputError, match=r"a single logit, .*: pass a model with one logit per class"):
        context_on(digits, tmp_path, model=timm.create_model("test_vit", num_classes=1))
    each = 4 * 64 * 197 * 13
    monkeypatch.setattr("edgeprune.pipeline.context.available_bytes", lambda: 20 * each / 0.8 + 1)
    assert context_on(digits, tmp_path, search_images=20).pictures is not None
    assert context_on(digits, tmp_path, method="none").pictures is not None
    with pytest.raises(InputError, match=r"on 70 pictures takes 0.0 GB .*: pass --search-images 20$"):
        context_on(digits, tmp_path)
