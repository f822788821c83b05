"""`run`, `verify` and `export-triton` on real bundles, where torch cannot be imported."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from support.builds import Shared, call, row_of, without_torch

from edgeprune import zoo
from edgeprune.bundles.triton import triton_entry
from edgeprune.io import sha256_file


def labelled() -> list[tuple[Path, int]]:
    """The embedded pictures with their labels."""
    with open(zoo.images_dir() / "labels.csv", newline="") as file:
        return [(zoo.images_dir() / row["image"], int(row["label"])) for row in csv.DictReader(file)]


@pytest.fixture
def changed(shared: Shared, tmp_path: Path) -> Callable[..., Path]:
    """changed(edit) is a copy of the bundle whose manifest `edit` has changed, with true hashes."""

    def make(edit: Callable[[dict[str, Any]], None] = lambda _: None, **files: bytes) -> Path:
        copy = Path(tempfile.mkdtemp(dir=tmp_path)) / "copy"
        shutil.copytree(shared.bundle, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        for name, data in files.items():
            file = copy / name.replace("__", ".")
            file.write_bytes(data)
            manifest["files"][file.name] = sha256_file(file)
        edit(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy

    return make


def test_run_names_the_digits(shared: Shared, tmp_path: Path) -> None:
    """A folder and a single picture, in order; without torch; the classes are those of the labels."""
    pictures = labelled()[:8]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path, _ in pictures[:7]:
        shutil.copy(path, folder)
    code, stdout, stderr = without_torch("run", shared.bundle, folder, pictures[7][0], "--top", "3", "--json")
    assert code == 0, stderr
    row = json.loads(stdout.splitlines()[-1])
    known = {path.name: label for path, label in pictures}
    assert len(row["rows"]) == 8 and row["rows"][-1]["image"] == str(pictures[7][0])
    right = [known[Path(r["image"]).name] == r["top"][0]["class"] for r in row["rows"]]
    assert sum(right) >= 7
    for entry in row["rows"]:
        shares = [found["percent"] for found in entry["top"]]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.001
        assert [found["label"] for found in entry["top"]] == [zoo.CLASS_NAMES[f["class"]] for f in entry["top"]]
    assert set(row["latency_ms"]) == {"median", "p99", "low", "high"}


def test_run_says_what_is_wrong_with_a_picture(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in (("missing.png", None), ("text.png", b"no picture")):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        code, _, err = call(capsys, "run", shared.bundle, tmp_path / name)
        assert code == 1 and name in err and len(err.splitlines()) == 1
    code, _, err = call(capsys, "run", tmp_path, tmp_path / "text.png")
    assert code == 1 and "not a bundle" in err


@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (30000, 2)])
def test_run_takes_any_shape(
    size: tuple[int, int], shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or says in one line that a picture is too narrow."""
    Image.new("L", size).save(tmp_path / "strip.png")
    code, _, err = call(capsys, "run", shared.bundle, tmp_path / "strip.png")
    assert code == 0 or (code == 1 and err.startswith("error: ") and "strip.png" in err)


def test_a_good_bundle_verifies(shared: Shared) -> None:
    code, stdout, stderr = without_torch("verify", shared.bundle, "--json")
    assert code == 0, stderr
    row = json.loads(stdout.splitlines()[-1])
    assert row["ok"] is True
    by_name = {check["name"]: check["status"] for check in row["checks"]}
    assert {"files", "runtime", "machine", "memory", "output", "latency"} <= set(by_name)
    assert {status for name, status in by_name.items() if name != "latency"} == {"ok"}


def test_every_mismatch_is_named(changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    golden = np.load(changed() / "golden_output.npy")
    cases: list[tuple[Callable[[dict[str, Any]], None], str, str]] = [
        (lambda m: m["engine"]["setup"].update(runtime="ort-cuda"), "runtime", "edgeprune compile"),
        (lambda m: m["engine"].update(size_bytes=1 << 50), "memory", "close other programs"),
        (lambda m: m["files"].update({"model.onnx": "0" * 64}), "files", "copy or build the bundle again"),
        (lambda m: m.update(schema=99), "files", "use the version of edgeprune that wrote it"),
        (lambda m: m.update(tolerance=-1.0), "output", "edgeprune compile"),
    ]
    for edit, name, advice in cases:
        bundle = changed(edit)
        code, out, err = call(capsys, "verify", bundle, "--json")
        row = json.loads(out.splitlines()[-1])
        failed = [check for check in row["checks"] if check["status"] == "failed"]
        assert code == 1 and not row["ok"] and [check["name"] for check in failed] == [name], row
        assert advice in err.splitlines()[-1], err
        assert failed[0]["expected"] != failed[0]["found"]
    for edit, name in (
        (lambda m: m["engine"]["setup"].update(runtime_version="0.1"), "runtime_version"),
        (lambda m: m.update(edgeprune="0.0.1"), "edgeprune"),
        (lambda m: m["report"]["latency"].update(samples_ms=[1e9] * 9), "latency"),
        (lambda m: m["report"]["latency"].update(samples_ms=[1e9]), "latency"),
    ):
        code, out, err = call(capsys, "verify", changed(edit), "--json")
        row = json.loads(out.splitlines()[-1])
        assert code == 0 and name in [c["name"] for c in row["checks"] if c["status"] == "warning"], err
    wrong = _bytes_of(golden + 1)
    code, _, err = call(capsys, "verify", changed(lambda _: None, golden_output__npy=wrong))
    assert code == 1 and "within 0.001 of the golden output" in err


def test_simulated_bundles_say_so_and_are_not_shipped(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = changed(lambda m: m["engine"]["setup"].update(runtime="simulated"))
    _, out, _ = call(capsys, "verify", bundle, "--json")
    row = json.loads(out.splitlines()[-1])
    assert row["simulated"] is True and ["simulated", "warning"] in [[c["name"], c["status"]] for c in row["checks"]]
    code, _, err = call(capsys, "ship", bundle, "nobody@host.invalid:models")
    assert code == 1 and "is simulated" in err
    code, _, err = call(capsys, "export-triton", bundle, bundle.parent / "repository")
    assert code == 1 and "is simulated" in err and not (bundle.parent / "repository").exists()


def _bytes_of(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_an_engine_of_another_machine_is_refused_by_run(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["engine"]["setup"]["runtime"] = "trt"

    bundle = changed(edit)
    code, _, err = call(capsys, "run", bundle, labelled()[0][0])
    assert (
        code == 1
        and "its engine was built for runtime 'trt', here it is 'ort-cpu'" in err
        and "edgeprune compile" in err
    )


# ---- Triton


def test_triton_entry(shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Triton's own schema reads the configuration; the model file is the engine as it is."""
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    row = row_of(capsys, "export-triton", shared.bundle, tmp_path / "repository", "--name", 'digits "a"')
    entry = Path(row["path"])
    config = text_format.Parse((entry / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (
        config.name == entry.name == 'digits "a"' and config.backend == "onnxruntime" and config.max_batch_size == 0
    )
    session = onnxruntime.InferenceSession(str(entry / "1" / "model.onnx"))
    for mine, theirs in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(t.name, list(t.dims)) for t in mine] == [(t.name, t.shape) for t in theirs]
        assert all(model_config_pb2.DataType.Name(t.data_type) == "TYPE_FP32" for t in mine)
    assert sha256_file(entry / "1" / "model.onnx") == sha256_file(shared.bundle / "model.onnx")
    assert (entry / config.output[0].label_filename).read_text().splitlines() == list(zoo.CLASS_NAMES)
    assert not config.HasField("optimization"), "only engines run as CUDA graphs"
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def test_triton_refuses_what_would_overwrite_or_escape(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton_entry(shared.bundle, tmp_path)
    for name, reason in ((None, "exists already"), ("../up", "the name of a model"), (".hid", "the name of a model")):
        options = ("--name", name) if name else ()
        code, _, err = call(capsys, "export-triton", shared.bundle, tmp_path, *options)
        assert code == 1 and reason in err
    (tmp_path / "file").write_text("")
    code, _, err = call(capsys, "export-triton", shared.bundle, tmp_path / "file")
    assert code == 1 and "cannot be written" in err
    assert not re.findall(r"\.tmp", " ".join(path.name for path in tmp_path.iterdir()))
