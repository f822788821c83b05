"""`edgeprune build` on the embedded model, checked against an evaluation that shares none of its code."""

from __future__ import annotations

import csv
import fcntl
import functools
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from edgeprune import cli, devices, zoo
from edgeprune.bundle import load_bundle
from edgeprune.errors import InputError

QUICK = ("--search-images", "4", "--rounds", "5", "--neighbours", "1")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "EDGEPRUNE_THREADS": "1"}  # on a busy machine a second one only waits
OFFLINE = {"HF_HUB_OFFLINE": "1"}
DENSE = (197,) * 12
LATENCY = {"median": float, "p99": float, "low": float, "high": float}
CONTRACT: dict[str, Any] = {
    "bundle": str,
    "model": str,
    "device": str,
    "runtime": str,
    "precision": str,
    "batch": int,
    "method": str,
    "policy": str,
    "tokens": list,
    "latency_ms": LATENCY,
    "dense_latency_ms": LATENCY,
    "speedup": float,
    "predicted_ms": float,
    "agreement": float,
    "kl": float,
    "top1": float,
    "dense_top1": float,
    "images": int,
    "probes": int,
}


class Shared(NamedTuple):
    """The one measured build of a test session."""

    bundle: Path
    work: Path
    command: tuple[str, ...]
    stdout: str
    stderr: str

    @property
    def row(self) -> dict[str, Any]:
        """What `--json` printed."""
        row: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return row


def program(*argv: object) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-m", "edgeprune.cli", *map(str, argv)]


def start(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, run to its end."""
    environment = os.environ | ONE_THREAD | options.pop("env", {})
    return subprocess.run(program(*argv), capture_output=True, text=True, timeout=900, env=environment, **options)


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout and stderr."""
    capsys.readouterr()
    arguments = mock.patch.object(sys, "argv", ["edgeprune", *map(str, argv)])
    with arguments, mock.patch.dict(os.environ, ONE_THREAD), pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def row_of(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The JSON object of a command that must succeed in this process."""
    code, out, err = call(capsys, *argv, "--json")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 1, out
    row: dict[str, Any] = json.loads(lines[0])
    return row


def shared_build(base: Path) -> Shared:
    """Build the embedded model once below `base`, in a process of its own; other test processes wait for it."""
    base = base / "shared"
    base.mkdir(exist_ok=True)
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        goal = ("--method", "pomt", "--speedup", "1.25")
        places = ("--work", str(base / "work"), "--out", str(base / "bundle"))
        command = ("build", "--device", "cpu", *goal, *QUICK, *places, "--json")
        said = base / "said.json"
        if not said.exists():
            done = start(*command)
            assert done.returncode == 0, done.stderr
            said.write_text(json.dumps([done.stdout, done.stderr]))
        return Shared(base / "bundle", base / "work", command, *json.loads(said.read_text()))


def copied(shared: Shared, base: Path) -> Shared:
    """The build for a test process of its own: two may not work in one folder at a time."""
    old, new = str(shared.bundle.parent), str(base / "shared")
    shutil.copytree(old, new)
    command = tuple(part.replace(old, new) for part in shared.command)
    return Shared(
        Path(new, "bundle"),
        Path(new, "work"),
        command,
        shared.stdout.replace(old, new),
        shared.stderr.replace(old, new),
    )


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 21 of the held-out digits."""
    return few_digits(tmp_path_factory.mktemp("few"))


def few_digits(folder: Path, count: int = 21) -> Path:
    """Copy the first digits with their labels; the CSV."""
    source = zoo.images_dir()
    with open(source / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    (folder / "images").mkdir(parents=True)
    for row in rows:
        shutil.copy(source / row["image"], folder / row["image"])
    lines = ["image,label", *(f"{row['image']},{row['label']}" for row in rows)]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


def labelled(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of a CSV as the embedded model takes them, (images, 3, 28, 28) fp32, and their labels."""
    pictures, labels = [], []
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            pixels = np.array(Image.open(source.parent / row["image"]).convert("RGB"), np.float32)
            pictures.append((pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
            labels.append(int(row["label"]))
    return np.stack(pictures).transpose(0, 3, 1, 2), np.array(labels)


def logits_of(model: Path, pictures: np.ndarray) -> np.ndarray:
    """Outputs of an ONNX file over pictures, batch by batch, the last batch filled up with zeros."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    size, rows = entry.shape[0], []
    for start in range(0, len(pictures), size):
        piece = np.zeros(entry.shape, np.float32)
        part = pictures[start : start + size]
        piece[: len(part)] = part
        rows.append(session.run(None, {entry.name: piece})[0][: len(part)])
    return np.concatenate(rows)


@functools.cache
def dense_logits(source: Path) -> np.ndarray:
    """Outputs of the unpruned embedded model in plain timm over the pictures of a CSV."""
    import torch
    from safetensors.torch import load_file

    model = zoo.vit_digits()
    model.load_state_dict(load_file(zoo.WEIGHTS), strict=True)
    pictures, _ = labelled(source)
    with torch.inference_mode():
        return torch.cat([model(part) for part in torch.from_numpy(pictures).split(50)]).numpy()


def percent(hits: np.ndarray) -> float:
    """Share of True, percent."""
    return 100 * sum(map(bool, hits)) / len(hits)


def kl_nats(dense: np.ndarray, pruned: np.ndarray) -> float:
    """Mean KL(dense || pruned) of the softmax distributions, from the definition."""
    p, q = (e / e.sum(1, keepdims=True) for e in (np.exp(x.astype(np.float64)) for x in (dense, pruned)))
    return float(np.mean(np.sum(p * np.log(p / q), axis=1)))


def normalised_tokens(model: Path) -> list[int]:
    """Token counts that the LayerNormalizations of an ONNX file put out, in order."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(model)), strict_mode=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    return [shapes[node.output[0]][1] for node in graph.node if node.op_type == "LayerNormalization"]


def expected_tokens(tokens: list[int], prefix_last: bool) -> list[int]:
    """What two norms per block (before attention, before the MLP) and the last norm put out."""
    counts, entering = [], DENSE[0]
    for leaving in tokens:
        counts += [entering, leaving]
        entering = leaving
    counts.append(entering)
    return [*counts[:-2], 1, 1] if prefix_last else counts  # a last block for the CLS token alone


def check_row(row: dict[str, Any], nullable: frozenset[str] = frozenset()) -> None:
    """Keys and types of the command contract."""
    for key, kind in CONTRACT.items():
        if row[key] is None:
            assert key in nullable, key
        elif isinstance(kind, dict):
            assert {k: type(v) for k, v in row[key].items()} == kind, key
        else:
            assert type(row[key]) is kind, key
    assert len(row["tokens"]) == 12
    assert row["tokens"] == sorted(row["tokens"], reverse=True)


def check_bundle(row: dict[str, Any], source: Path) -> None:
    """Row, manifest and ONNX of a build say the same as an evaluation by hand on the pictures of a CSV."""
    folder = Path(row["bundle"])
    schedule = json.loads((folder / "manifest.json").read_text())["schedule"]
    pictures, labels = labelled(source)
    pruned, dense = logits_of(folder / "model.onnx", pictures), dense_logits(source)
    assert row["images"] == len(pictures)
    assert row["top1"] == pytest.approx(percent(pruned.argmax(1) == labels), abs=1e-9)
    assert row["dense_top1"] == pytest.approx(percent(dense.argmax(1) == labels), abs=1e-9)
    assert row["agreement"] == pytest.approx(percent(pruned.argmax(1) == dense.argmax(1)), abs=1e-9)
    assert row["kl"] == pytest.approx(kl_nats(dense, pruned), rel=1e-3, abs=1e-6)
    assert schedule["tokens"] == row["tokens"]
    wanted = expected_tokens(row["tokens"], schedule.get("prefix_last", False))
    assert normalised_tokens(folder / "model.onnx") == wanted


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- the measured build ---


def test_stdout_is_one_json_object(shared: Shared) -> None:
    assert len(shared.stdout.splitlines()) == 1
    check_row(shared.row)
    assert shared.row["bundle"] == str(shared.bundle)
    expected = ("vit_digits", "cpu", "ort-cpu", "fp32", 1, "pomt", "search")
    assert tuple(shared.row[k] for k in ("model", "device", "runtime", "precision", "batch", "method", "policy")) == (
        expected
    )
    assert not shared.row.get("simulated")


def test_table_and_steps_go_to_stderr(shared: Shared) -> None:
    assert "unpruned" in shared.stderr
    assert "staircase: done" in shared.stderr
    assert "\x1b" not in shared.stderr and "\r" not in shared.stderr  # no bar where there is no terminal
    assert "Warning" not in shared.stderr


def test_bundle_is_complete_and_hashed(shared: Shared) -> None:
    manifest = json.loads((shared.bundle / "manifest.json").read_text())
    found = digests(shared.bundle)
    del found["manifest.json"]
    assert manifest["files"] == found
    assert {"model.onnx", "golden_input.npy", "golden_output.npy", "staircase.json"} <= set(found)
    assert manifest["engine"]["sha256"] == manifest["engine"]["onnx_sha256"] == found["model.onnx"]
    assert manifest["engine"]["size_bytes"] == (shared.bundle / "model.onnx").stat().st_size
    assert manifest["labels"] == [str(digit) for digit in range(10)]
    assert load_bundle(shared.bundle).engine.sha256 == found["model.onnx"]
    leftovers = [p for p in shared.bundle.parent.rglob("*") if p.suffix in (".tmp", ".old")]
    assert not leftovers


def test_golden_input_gives_the_golden_output(shared: Shared) -> None:
    golden_in = np.load(shared.bundle / "golden_input.npy", allow_pickle=False)
    golden_out = np.load(shared.bundle / "golden_output.npy", allow_pickle=False)
    assert golden_in.shape == (1, 3, 28, 28) and golden_out.shape == (1, 10)
    np.testing.assert_allclose(logits_of(shared.bundle / "model.onnx", golden_in), golden_out, atol=1e-5)
    pictures, _ = labelled(zoo.images_dir() / "labels.csv")
    np.testing.assert_allclose(golden_in, pictures[:1], atol=1e-6)  # real input, not noise


def test_fidelity_equals_an_independent_evaluation(shared: Shared) -> None:
    check_bundle(shared.row, zoo.images_dir() / "labels.csv")


def test_latency_is_that_of_the_stored_samples(shared: Shared) -> None:
    report = json.loads((shared.bundle / "manifest.json").read_text())["report"]
    pruned, dense = report["latency"]["samples_ms"], report["dense_latency"]["samples_ms"]
    row = shared.row
    assert len(pruned) == len(dense) >= 5
    assert row["latency_ms"]["median"] == pytest.approx(statistics.median(pruned))
    assert row["dense_latency_ms"]["median"] == pytest.approx(statistics.median(dense))
    assert row["speedup"] == pytest.approx(statistics.median(a / b for a, b in zip(dense, pruned, strict=True)))
    for latency in (row["latency_ms"], row["dense_latency_ms"]):
        assert 0 < latency["low"] <= latency["median"] <= latency["high"]
    staircase = json.loads((shared.bundle / "staircase.json").read_text())
    assert row["probes"] == sum(len(point["latency"]["samples_ms"]) for point in staircase["points"])


def test_second_build_reuses_every_step(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> tuple[object, ...]:
        staircases = {p.name: p.stat().st_mtime_ns for p in shared.work.glob("staircase-*.json")}
        assert staircases
        return digests(shared.bundle), staircases, (shared.bundle / "manifest.json").stat().st_ino

    before = state()
    code, out, err = call(capsys, *shared.command)
    assert code == 0
    assert out == shared.stdout
    steps = [line for line in err.splitlines() if ": reused " in line]
    assert {"staircase", "schedule", "model", "latency", "logits", "bundle"} <= {line.split(":")[0] for line in steps}
    assert not [line for line in err.splitlines() if line.endswith(": done")]
    assert state() == before


def test_another_folder_gets_the_identical_bundle(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "bundle"
    command = [str(out) if part == str(shared.bundle) else part for part in shared.command]
    row = row_of(capsys, *command[:-1])
    assert row == shared.row | {"bundle": str(out)}
    assert digests(out) == digests(shared.bundle)


# --- other options, on the tail-effect model: deterministic, and no latency to wait for ---


@pytest.fixture(scope="module")
def simulate(shared: Shared, tmp_path_factory: pytest.TempPathFactory, few: Path) -> Callable[..., dict[str, Any]]:
    """Build for a simulated Orin Nano on a few digits; the probes are the measured build's."""
    base = tmp_path_factory.mktemp("simulated")

    def run(capsys: pytest.CaptureFixture[str], name: str, *options: object) -> dict[str, Any]:
        places = ("--work", shared.work, "--out", base / name)
        common = ("--device", "orin-nano", "--precision", "fp32", "--simulate", "--search-images", 4, *places)
        images = () if "--images" in options else ("--images", few)
        return row_of(capsys, "build", *common, *images, *options)

    return run


def test_weights_outside_the_onnx_travel_in_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model too large for one ONNX file: probes, engine and bundle, which needs no work folder."""
    from edgeprune import graph
    from edgeprune.job import Options
    from edgeprune.pipeline import build
    from edgeprune.schedule import Goal

    monkeypatch.setattr(graph, "INLINE_BYTES", 0)
    monkeypatch.setattr("edgeprune.profiling.ROUNDS", 3)
    options = Options(
        method="topk", policy="paper", goal=Goal(alpha=0.1), rounds=5, search_images=4,
        work=tmp_path / "work", out=tmp_path / "bundle",
    )  # fmt: skip
    built = build(options)
    assert next((tmp_path / "work").glob("probes-*/dense-*.weights")).stat().st_size > 1 << 20
    shutil.rmtree(tmp_path / "work")
    manifest = load_bundle(built.path)
    (weights,) = (built.path / name for name in manifest.files if name.endswith(".weights"))
    model = built.path / "model.onnx"
    assert manifest.engine.size_bytes == model.stat().st_size + weights.stat().st_size > 1 << 20
    session = onnxruntime.InferenceSession(os.fspath(model), providers=["CPUExecutionProvider"])
    golden = [np.load(built.path / f"golden_{name}.npy") for name in ("input", "output")]
    np.testing.assert_allclose(session.run(None, {"images": golden[0]})[0], golden[1], atol=1e-4)
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(InputError, match=f"{weights.name} has sha256"):
        load_bundle(built.path)


def test_none_is_the_unpruned_model(
    simulate: Callable[..., dict[str, Any]], few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "none", "--method", "none")
    check_row(row)
    check_bundle(row, few)
    assert tuple(row["tokens"]) == DENSE
    assert row["agreement"] == 100
    assert row["kl"] < 1e-6


def test_speedup_is_met(
    simulate: Callable[..., dict[str, Any]], few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "topk", "--method", "topk", "--speedup", "1.3")
    check_row(row)
    check_bundle(row, few)
    assert row["method"] == "topk"
    assert min(row["tokens"]) < DENSE[0]
    assert row["speedup"] >= 1.3 * 0.98


def test_paper_policy_cuts_once_in_block_3(
    simulate: Callable[..., dict[str, Any]], few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "paper", "--method", "pomt", "--policy", "paper", "--alpha", "0.5")
    check_row(row)
    check_bundle(row, few)
    assert row["policy"] == "paper"
    assert row["tokens"][:3] == [197] * 3
    assert row["tokens"][3] < 197
    assert len(set(row["tokens"][3:])) == 1


def test_max_drop_bounds_the_loss(
    simulate: Callable[..., dict[str, Any]], few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "evit", "--method", "evit", "--max-drop", "5")
    check_row(row)
    check_bundle(row, few)
    assert row["method"] == "evit"
    assert row["dense_top1"] - row["top1"] <= 5
    assert row["speedup"] > 1


def test_pictures_without_labels_give_no_top1(
    simulate: Callable[..., dict[str, Any]], few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "loose", "--method", "none", "--images", few.parent / "images")
    check_row(row, frozenset({"top1", "dense_top1"}))
    assert row["top1"] is row["dense_top1"] is None
    assert row["images"] == 21 and row["agreement"] == 100


def test_simulated_figures_say_so(
    simulate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "none", "--method", "none")
    assert row["simulated"] is True
    assert (row["device"], row["runtime"]) == ("orin-nano", "simulated")
    (benched,) = row_of(capsys, "bench", row["bundle"])["rows"]
    assert benched["simulated"] is True
    setup = load_bundle(Path(row["bundle"])).engine.setup
    assert setup.simulated and "simulated" in setup.machine
    code, out, _ = call(capsys, "bench", row["bundle"])  # the table for a person too
    assert code == 0 and "SIMULATED" in out


def test_own_device_file_builds_and_benches(
    shared: Shared, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    text = (Path(devices.__file__).parent / "orin-nano.toml").read_text()
    board = tmp_path / "board.toml"
    board.write_text(text.replace('name = "orin-nano"', 'name = "my-board"'))
    monkeypatch.chdir(tmp_path)
    common = ("--simulate", "--method", "none", "--images", few, "--search-images", 4, "--work", shared.work)
    row = row_of(capsys, "build", "--device", board, *common)
    assert row["device"] == "my-board"
    assert Path(row["bundle"]).parts[:2] == ("engines", "my-board")
    (other,) = row_of(capsys, "bench", row["bundle"])["rows"]
    assert other["latency_ms"]["median"] == row["latency_ms"]["median"]


# --- the real model ---


@pytest.fixture
def big_work(tmp_path: Path) -> Iterator[Path]:
    """A work folder that does not outlive its test: its probes are large."""
    yield tmp_path / "work"
    shutil.rmtree(tmp_path / "work", ignore_errors=True)


@pytest.mark.assets
def test_vit_tiny_on_imagenet(assets: Path, tmp_path: Path, big_work: Path) -> None:
    weights = assets / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    images = assets / "imagenet-val-650" / "labels.csv"
    model = ("--model", "vit_tiny_patch16_224", "--weights", weights, "--images", images)
    goal = ("--method", "pomt", "--speedup", "1.25", "--search-images", "8", "--rounds", "15", "--neighbours", "1")
    done = start("build", *model, *goal, "--work", big_work, "--out", tmp_path / "bundle", "--json", env=OFFLINE)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    check_row(row)
    assert row["images"] == 650
    assert row["dense_top1"] == pytest.approx(82.77, abs=0.1)  # timm's own evaluation of these images
    assert row["speedup"] > 1.1
    labels = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["labels"]
    assert len(labels) == 1000
    assert "tench" in labels[0] and "goldfish" in labels[1] and "toilet" in labels[999]
