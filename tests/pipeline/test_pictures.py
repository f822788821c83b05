"""Which pictures choose a schedule, and which its figures are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.builds import few_digits

from edgeprune.images import calibration_indices
from edgeprune.pipeline.context import Context, Options, context_for
from edgeprune.pipeline.scores import ScheduleScores


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


def test_max_drop_is_judged_on_the_search_pictures(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no picture would be left for the figures. The second schedule is wrong on one of ten pictures."""
    context = context_on(digits, tmp_path, search_images=10)
    pictures = context.needed_pictures()
    labels = pictures.labels(pictures.search)
    assert labels is not None
    right = np.eye(10, dtype=np.float32)[labels]
    dense, seen = context.dense_tokens, []

    def logits(model: Any, method: str, tokens: Any, pixels: NDArray[np.uint8], *_: Any) -> NDArray[np.float32]:
        seen.append(pixels)
        return right if tokens == dense else np.concatenate([np.roll(right[:1], 1), right[1:]])

    monkeypatch.setattr("edgeprune.vit.fidelity.logits_of_schedule", logits)
    assert ScheduleScores(context).drop((*dense[:-1], 20)) == pytest.approx(10)
    assert len(seen) == 2
    for pixels in seen:
        np.testing.assert_array_equal(pixels, pictures.pixels[pictures.search])
