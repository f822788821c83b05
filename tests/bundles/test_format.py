"""Bundles: whole or not at all, and refused when a file is missing, changed or leads elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeprune.bundles import format as bundle
from edgeprune.bundles.format import load_bundle, staircase_of, version_name, write_bundle
from edgeprune.errors import EdgepruneError, InputError, OutputError, RecordError
from edgeprune.records import Engine, Latency, Preprocessing, Report, Schedule, Setup, Vit

SETUP = Setup(
    device="cpu", machine="abacus", runtime="ort-cpu", runtime_version="1.0", precision="fp32", batch=1, threads=1
)
VIT = Vit(
    name="toy",
    weights_sha256="0" * 64,
    family="vit",
    image_px=4,
    patch_px=2,
    depth=2,
    width=8,
    heads=2,
    head_dim=4,
    mlp_width=16,
    prefix=1,
    tokens=5,
    classes=2,
    prefix_pooled=True,
)
GOLDEN = np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4), np.array([[0.25, -1.0]], np.float32)


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """parts(model) is all that write_bundle takes besides the folder, for an engine of these bytes."""

    def make(model: bytes = b"engine") -> dict[str, Any]:
        file = tmp_path / "engine.onnx"
        file.write_bytes(model)
        digest = hashlib.sha256(model).hexdigest()
        latency = Latency(samples_ms=(1.0, 2.0, 3.0))
        return {
            "vit": VIT,
            "files": {"model.onnx": file},
            "engine": Engine(
                path="model.onnx", sha256=digest, onnx_sha256=digest, size_bytes=len(model), setup=SETUP
            ),
            "schedule": Schedule(vit=VIT, method="topk", policy="search", tokens=(5, 3)),
            "staircase": None,
            "report": Report(latency=latency, dense_latency=latency, speedup=1.0, speedup_interval=(0.9, 1.1)),
            "preprocessing": Preprocessing(
                image_px=4,
                resize_px=4,
                interpolation="bicubic",
                crop_mode="center",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
            ),
            "labels": ("no", "yes"),
            "golden": GOLDEN,
        }

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a bundle's manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_what_is_written_is_loaded(parts: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bundle"
    written = write_bundle(out, **parts(), extra={"note.txt": b"kept"})
    assert load_bundle(out) == written
    assert written.files == {
        name: hashlib.sha256(data).hexdigest() for name, data in contents(out).items() if name != "manifest.json"
    }
    assert set(written.files) == {"model.onnx", "golden_input.npy", "golden_output.npy", "note.txt"}
    for name, array in zip(("golden_input.npy", "golden_output.npy"), GOLDEN, strict=True):
        np.testing.assert_array_equal(np.load(out / name, allow_pickle=False), array)
    assert out.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("method", ["save", "copyfile", "rename", "rename back"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["Ctrl-C", "disk full"]
)
def test_interrupted_write_leaves_the_old_bundle(
    method: str, error: Any, parts: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step fails, the folder holds the old bundle, or never existed, and nothing lies beside it."""
    out = tmp_path / "place" / "bundle"
    write_bundle(out, **parts(b"old"))
    before = contents(out.parent)
    real, calls = os.rename, []

    def fail(*_: object, **__: object) -> None:
        raise error

    def fail_second(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise error
        real(source, target)

    if method == "save":
        monkeypatch.setattr(np, "save", fail)
    elif method == "copyfile":
        monkeypatch.setattr(bundle.shutil, "copyfile", fail)
    else:
        monkeypatch.setattr(bundle, "_swapped", lambda *_: False)  # a file system that cannot swap folders
        monkeypatch.setattr(os, "rename", fail if method == "rename" else fail_second)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        write_bundle(out, **parts(b"new"))
    assert contents(out.parent) == before
    load_bundle(out)


def test_interrupted_first_write_leaves_nothing(
    parts: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "place" / "bundle"

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(out, **parts())
    assert not list(out.parent.iterdir())


def test_new_bundle_replaces_all_of_the_old(parts: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "place" / "bundle"
    write_bundle(out, **parts(b"old"), extra={"old.txt": b"old"})
    written = write_bundle(out, **parts(b"new"))
    assert load_bundle(out) == written
    assert (out / "model.onnx").read_bytes() == b"new"
    assert not (out / "old.txt").exists()
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]


def test_folder_that_is_no_bundle_is_left_alone(parts: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("irreplaceable")
    with pytest.raises(InputError, match="is not a bundle"):
        write_bundle(out, **parts())
    assert contents(out) == {"chapter1.tex": b"irreplaceable"}


def test_empty_folder_is_taken(parts: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_bundle(tmp_path / "empty", **parts())
    load_bundle(tmp_path / "empty")


def test_place_below_a_file(parts: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="cannot be written"):
        write_bundle(tmp_path / "file" / "bundle", **parts())
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["model.onnx", "golden_input.npy", "golden_output.npy"])
@pytest.mark.parametrize("harm", ["changed", "cut", "deleted", "linked"])
def test_damaged_file_is_named(name: str, harm: str, parts: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write_bundle(out, **parts())
    file, data = out / name, (out / name).read_bytes()
    file.unlink()
    if harm == "changed":
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif harm == "cut":
        file.write_bytes(data[:-1])
    elif harm == "linked":  # the same bytes, but somebody else may change them
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=name):
        load_bundle(out)


@pytest.mark.parametrize(
    "name", ["../secret", "sub/file", "/etc/hostname", "..", ".", "", "a\0b", "a\nb", "-rf", ".hidden"]
)
def test_manifest_cannot_lead_out_of_the_bundle(
    name: str, parts: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    write_bundle(out, **parts())
    (tmp_path / "secret").write_bytes(b"secret")
    (out / "sub").mkdir()
    (out / "sub" / "file").write_bytes(b"secret")
    for there in ("a\nb", "-rf", ".hidden"):
        (out / there).write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    rewrite(out, lambda m: m["files"].update({name: digest}))
    with pytest.raises(RecordError, match="is not a valid name of a file in a bundle"):
        load_bundle(out)


@pytest.mark.parametrize("name", ["../model.onnx", "/model.onnx", "other.onnx", "", "model.engine"])
def test_engine_is_a_file_of_the_manifest(name: str, parts: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write_bundle(out, **parts())
    (tmp_path / "model.onnx").write_bytes(b"engine")
    (out / "other.onnx").write_bytes(b"engine")
    rewrite(out, lambda m: m["engine"].update(path=name))
    with pytest.raises(InputError, match=r"not in the manifest|the engine is one of"):
        load_bundle(out)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.update(schema=2), "schema 2"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("engine"), "engine"),
        (lambda m: m["schedule"].update(tokens=[3, 5]), "tokens"),
        (lambda m: m["report"]["latency"].update(samples_ms=[]), "samples_ms"),
        (lambda m: m["vit"].update(depth="two"), "depth"),
    ],
    ids=["schema", "unknown key", "missing key", "rising tokens", "no samples", "wrong type"],
)
def test_manifest_that_breaks_its_schema(
    change: Callable[[dict[str, Any]], Any], complaint: str, parts: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    write_bundle(out, **parts())
    rewrite(out, change)
    with pytest.raises(RecordError, match=complaint):
        load_bundle(out)


def test_manifest_from_another_program(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b'{"name": "a web app"}')
    with pytest.raises(EdgepruneError):
        load_bundle(tmp_path)


def test_staircase_travels_in_the_bundle(
    parts: Callable[..., dict[str, Any]], make_staircase: Callable[..., Any], tmp_path: Path
) -> None:
    staircase = make_staircase({1: 1.0, 3: 2.0, 5: 3.0})
    write_bundle(tmp_path / "bundle", **parts() | {"staircase": staircase})
    assert staircase_of(tmp_path / "bundle") == staircase


@pytest.mark.parametrize(
    ("name", "plain"), [("hf-hub:a/b@rev", "hf-hub-a-b-rev"), ("modèle [1]", "mod-le--1-"), (".hidden", "hidden")]
)
def test_any_model_has_a_plain_name_on_a_device(
    name: str, plain: str, tmp_path: Path, parts: Callable[..., dict[str, Any]]
) -> None:
    """Ship, pack and the script that installs use it as the name of a folder."""
    manifest = write_bundle(tmp_path / "b", **parts())
    named = msgspec.structs.replace(manifest, vit=msgspec.structs.replace(manifest.vit, name=name))
    assert re.fullmatch(re.escape(plain) + r"-\w+-fp32-b1-[0-9a-f]{12}", version_name(tmp_path / "b", named))
