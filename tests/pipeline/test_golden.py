"""The golden input and output of a bundle: one image with a tie of scores is forgiven, another model is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeprune.bundles.format import MANIFEST, load_bundle
from edgeprune.bundles.verify import verify
from edgeprune.cli.tables import build_table
from edgeprune.errors import EngineError
from edgeprune.io import load_array, sha256_file
from edgeprune.pipeline.compile import bundle_from_onnx
from edgeprune.records import BuildTrace, Latency, ModelMetadata, Preprocessing, Report, Schedule, Vit
from edgeprune.runtimes.target import Target, target_for

BATCH = 3
IMAGES = np.random.default_rng(0).standard_normal((BATCH, 3, 2, 2)).astype(np.float32)
LOGITS = IMAGES.reshape(BATCH, -1)  # what the toy model computes
CASES = [(1, 0.1, True), (2, 0.1, False), (BATCH, 1e-4, True), (1, np.nan, False)]
NAMES = ["a tie of scores", "another model", "rounding", "NaN"]


def off(images: int, by: float) -> NDArray[np.float32]:
    """The logits, those of the first images changed in one class."""
    changed = LOGITS.copy()
    changed[:images, 5] += by
    return changed


def metadata() -> ModelMetadata:
    vit = Vit(
        name="toy", weights_sha256="0" * 64, family="vit", image_px=2, patch_px=1, depth=2, width=8, heads=2,
        head_dim=4, mlp_width=16, prefix=1, tokens=5, classes=12, prefix_pooled=True,
    )  # fmt: skip
    how = Preprocessing(
        image_px=2, resize_px=2, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    schedule = Schedule(vit=vit, method="topk", policy="search", tokens=(5, 3))
    return ModelMetadata(vit=vit, schedule=schedule, preprocessing=how, labels=tuple("abcdefghijkl"))


@pytest.fixture
def flatten(tmp_path: Path) -> Path:
    """An ONNX file that flattens a batch of images to their logits."""
    ends = (("images", IMAGES.shape), ("logits", LOGITS.shape))
    entry, leaving = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends)
    graph = helper.make_graph([helper.make_node("Flatten", ["images"], ["logits"])], "toy", [entry], [leaving])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "toy.onnx")
    return tmp_path / "toy.onnx"


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return target_for("cpu", batch=BATCH, work=tmp_path / "work")


def made(target: Target, onnx: Path, out: Path, expected: NDArray[np.float32] | None = None) -> Any:
    report = Report(latency=Latency(samples_ms=(1.0,)))
    return bundle_from_onnx(target, out, onnx, metadata(), report, IMAGES, None, expected)


def test_a_bundle_is_kept_where_nothing_differs(target: Target, flatten: Path, tmp_path: Path) -> None:
    """Class folders may be renamed, the preprocessing changed, or another goal lead to the same schedule."""
    out, first = tmp_path / "bundle", metadata()
    how = msgspec.structs.replace(first.preprocessing, mean=(0.4,) * 3)
    renamed = msgspec.structs.replace(first, labels=tuple("ABCDEFGHIJKL"))
    other = msgspec.structs.replace(renamed, preprocessing=how)
    report, written = Report(latency=Latency(samples_ms=(1.0,))), list[str]()
    for given, asked in ((first, "1 ms"), (renamed, "1 ms"), (other, "1 ms"), (other, "2 ms")):

        def trace(asked: str = asked) -> BuildTrace:
            written.append(asked)
            return BuildTrace()

        for _ in range(2):
            manifest = bundle_from_onnx(target, out, flatten, given, report, IMAGES, None, None, trace, asked)
            assert (manifest.labels, manifest.preprocessing) == (given.labels, given.preprocessing)
            assert json.loads((out / "story.json").read_text())["asked"] == asked
    assert written == ["1 ms", "1 ms", "1 ms", "2 ms"], "each is written once, then kept"


@pytest.mark.parametrize(("figures", "unpruned"), [({}, "–"), ({"agreement": 98.0, "kl": 0.5}, "100 0")])
def test_table_shows_dashes_where_nothing_was_compared(
    figures: dict[str, float], unpruned: str, target: Target, flatten: Path, tmp_path: Path
) -> None:
    manifest = made(target, flatten, tmp_path / "bundle")
    report = msgspec.structs.replace(manifest.report, **figures)
    table = build_table(msgspec.structs.replace(manifest, report=report))
    names, dense = (list(table.columns[index].cells) for index in (0, 1))
    found = [dense[names.index(name)] for name in ("agreement, %", "KL, nats")]
    assert " ".join(dict.fromkeys(found)) == unpruned
    assert "speed-up (95 % interval)" not in names


@pytest.mark.parametrize(("images", "by", "good"), CASES, ids=NAMES)
def test_compile_compares_with_the_bundle_the_onnx_lies_in(
    images: int, by: float, good: bool, target: Target, flatten: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    if good:
        made(target, flatten, out, off(images, by))
        np.testing.assert_array_equal(load_array(out / "golden_output.npy"), LOGITS)
    else:
        with pytest.raises(EngineError, match="outputs differ by"):
            made(target, flatten, out, off(images, by))
        assert not out.exists()


@pytest.mark.parametrize(("images", "by", "good"), CASES, ids=NAMES)
def test_verify_compares_with_the_golden_output(
    images: int, by: float, good: bool, target: Target, flatten: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    made(target, flatten, out)
    np.save(out / "golden_output.npy", off(images, by))
    record = json.loads((out / MANIFEST).read_text())
    record["files"]["golden_output.npy"] = sha256_file(out / "golden_output.npy")
    (out / MANIFEST).write_text(json.dumps(record))
    assert load_bundle(out).engine.setup.batch == BATCH
    found = {check.name: check.status for check in verify(out)}
    assert found["output"] == ("ok" if good else "failed"), found
