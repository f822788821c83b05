"""`edgeprune compile` and the flow over two machines: what the second does runs where torch cannot be imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from support.builds import CONTRACT, Shallow, Shared, call, few_digits, row_of, without_torch

from edgeprune.bundles.format import load_bundle
from edgeprune.errors import InputError
from edgeprune.io import load
from edgeprune.onnx_graph.graph import attach, metadata_in
from edgeprune.records import Schedule, Staircase

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 21 digits."""
    return few_digits(tmp_path_factory.mktemp("digits"))


def test_two_machines(shared: Shared, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A workstation exports; the device, which has no torch, compiles, measures and checks."""
    work = ("--work", tmp_path / "work")
    schedule, model, dense = (tmp_path / name for name in ("schedule.json", "model.onnx", "dense.onnx"))
    schedule.write_bytes(msgspec.json.encode(load_bundle(shared.bundle).schedule))
    row_of(capsys, "export", "--schedule", schedule, "--out", model)
    row_of(capsys, "export", "--dense", "--out", dense)
    beside = ("--dense", dense, "--staircase", shared.bundle / "staircase.json", "--images", few)
    options = (*beside, "--rounds", "5", *work, "--out", tmp_path / "bundle", "--json")
    code, stdout, stderr = without_torch("compile", model, "--device", "cpu", *options)
    assert code == 0, stderr
    row = json.loads(stdout.splitlines()[-1])
    assert set(CONTRACT) <= set(row) and None not in (row[key] for key in CONTRACT)
    assert row["tokens"] == list(load(schedule, Schedule).tokens) and row["images"] == 21
    made = load_bundle(tmp_path / "bundle")
    staircase = load(shared.bundle / "staircase.json", Staircase)
    drift = row["dense_latency_ms"]["median"] / staircase.dense.median_ms  # of the unpruned model since then
    assert made.schedule.predicted_ms is not None
    assert row["predicted_ms"] == pytest.approx(made.schedule.predicted_ms * drift)
    assert made.labels == load_bundle(shared.bundle).labels and made.engine.path == "model.onnx"
    assert load(tmp_path / "bundle" / "staircase.json", Staircase).vit == made.vit
    code, stdout, stderr = without_torch("bench", tmp_path / "bundle", "--rounds", "5", "--json")
    assert code == 0, stderr


def test_onnx_of_a_bundle_is_rebuilt(shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same logits on the same golden input; what was not measured again is null."""
    out = tmp_path / "again"
    row = row_of(capsys, "compile", shared.bundle / "model.onnx", "--rounds", "5", "--work", tmp_path, "--out", out)
    assert row["speedup"] is row["dense_latency_ms"] is row["top1"] is row["predicted_ms"] is None
    for name in ("golden_input.npy", "golden_output.npy"):
        np.testing.assert_allclose(np.load(out / name), np.load(shared.bundle / name), atol=1e-4)
    assert load_bundle(out).schedule == load_bundle(shared.bundle).schedule
    assert row_of(capsys, "report", out) == {"path": str(out / "report.html")}


def test_an_engine_with_other_logits_is_refused(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a broken driver would give them: the bundle's golden output is what this ONNX should give."""
    bundle = tmp_path / "bundle"
    shutil.copytree(shared.bundle, bundle)
    golden = np.load(bundle / "golden_output.npy")
    np.save(bundle / "golden_output.npy", golden + 0.1)
    manifest = json.loads((bundle / "manifest.json").read_text())
    from edgeprune.io import sha256_file

    manifest["files"]["golden_output.npy"] = sha256_file(bundle / "golden_output.npy")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = call(
        capsys, "compile", bundle / "model.onnx", "--rounds", "5", "--work", tmp_path, "--out", tmp_path / "again"
    )
    assert code == 1 and "outputs differ by 0.1" in err
    assert not (tmp_path / "again").exists(), "a wrong engine must not be there to be used"


def test_an_onnx_that_says_nothing_is_refused(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.onnx"
    shutil.copy(shared.bundle / "model.onnx", bare)
    code, _, err = call(capsys, "compile", bare, "--work", tmp_path)
    assert code == 1 and "edgeprune export" in err
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    code, _, err = call(capsys, "compile", tmp_path / "junk.onnx", "--work", tmp_path)
    assert code == 1 and "not an ONNX file" in err


def test_an_unpruned_file_that_does_not_belong_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """In another precision or of another model its speed-up would mean nothing; without metadata it is taken."""
    from edgeprune.pipeline.compile import check_dense
    from edgeprune.pipeline.export import export_model

    model = tiny("cls", 1)
    other = replace(model, vit=msgspec.structs.replace(model.vit, weights_sha256="1" * 64))
    single, half, another = (tmp_path / f"{name}.onnx" for name in ("single", "half", "another"))
    for source, path, precision in ((model, single, "fp32"), (model, half, "fp16"), (other, another, "fp32")):
        export_model(source, None, 1, path, precision)
    check_dense(single, single, model.vit)
    with pytest.raises(InputError, match=r"half\.onnx holds fp16, .*single\.onnx fp32: export both with the same"):
        check_dense(half, single, model.vit)
    with pytest.raises(InputError, match=r"another\.onnx is of cls, not of this cls with these weights: export"):
        check_dense(another, single, model.vit)
    bare = onnx.load(another)
    del bare.metadata_props[:]
    onnx.save(bare, another)
    check_dense(another, single, model.vit)


def test_another_setups_staircase_is_refused(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((shared.bundle / "staircase.json").read_text())
    record["setup"]["machine"] = "another"
    (tmp_path / "s.json").write_text(json.dumps(record))
    given = ("--staircase", tmp_path / "s.json", "--work", tmp_path / "w", "--out", tmp_path / "out")
    code, _, err = call(capsys, "compile", shared.bundle / "model.onnx", *given)
    assert code == 1 and "another model or setup" in err and not (tmp_path / "out").exists()


def test_metadata_survives_the_file(shared: Shared, tmp_path: Path) -> None:
    from edgeprune.pipeline.compile import described

    metadata, _ = described(shared.bundle / "model.onnx")
    model = onnx.load(shared.bundle / "model.onnx")
    assert metadata_in(shared.bundle / "model.onnx") is None
    attach(metadata, model)
    onnx.save(model, tmp_path / "m.onnx")
    assert metadata_in(tmp_path / "m.onnx") == metadata


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_export_in_a_precision_compiles(
    precision: str, shallow: Shallow, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    options = ("--model", shallow.model, "--precision", precision, "--images", few, "--out", out)
    row_of(capsys, "export", "--dense", *options)
    row = row_of(
        capsys, "compile", out, "--images", few, "--rounds", "5", "--work", tmp_path, "--out", tmp_path / "b"
    )
    assert row["precision"] == precision and row["top1"] > 90
