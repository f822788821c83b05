"""`edgeprune build` on the embedded model, checked against an evaluation that shares none of its code."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from support.builds import Shallow, Shared, call, check_row, few_digits, row_of, start
from support.evaluation import DENSE, dense_logits, expected_tokens, labelled, logits_of, normalised_tokens
from support.processes import search_less

from edgeprune import devices, zoo
from edgeprune.bundles.format import load_bundle
from edgeprune.errors import InputError
from edgeprune.runtimes.steps import LABELS

OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 21 of the held-out digits."""
    return few_digits(tmp_path_factory.mktemp("few"))


def percent(hits: np.ndarray) -> float:
    """Share of True, percent."""
    return 100 * sum(map(bool, hits)) / len(hits)


def kl_nats(dense: np.ndarray, pruned: np.ndarray) -> float:
    """Mean KL(dense || pruned) of the softmax distributions, from the definition."""
    p, q = (e / e.sum(1, keepdims=True) for e in (np.exp(x.astype(np.float64)) for x in (dense, pruned)))
    return float(np.mean(np.sum(p * np.log(p / q), axis=1)))


def check_bundle(row: dict[str, Any], source: Path, searched: int = 4, depth: int = 12) -> None:
    """Row, manifest and ONNX of a build say the same as an evaluation by hand on the pictures of a CSV.

    Of these on the ones that the schedule was not chosen on, where that leaves 32 or more.
    """
    folder = Path(row["bundle"])
    schedule = json.loads((folder / "manifest.json").read_text())["schedule"]
    pictures, labels = labelled(source)
    pruned, dense = logits_of(folder / "model.onnx", pictures), dense_logits(source, depth)
    order = np.random.default_rng(0).permutation(len(pictures))
    left = order[searched:] if row["method"] != "none" else order
    enough = len(left) >= 32 or row["method"] == "none"
    pruned, dense, labels = (array[left] if enough else array for array in (pruned, dense, labels))
    assert row["images"] == len(labels) and row["held_out"] is enough
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
    assert "446 images not used to choose the schedule" in " ".join(shared.stderr.split())
    assert "measuring the staircase: done" in shared.stderr and "exporting ONNX: done" in shared.stderr
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
    [index] = np.flatnonzero(np.abs(pictures - golden_in).max(axis=(1, 2, 3)) < 1e-6)  # real input, not noise
    assert index < 8


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
    kinds = {LABELS[name] for name in ("staircase", "schedule", "model", "latency", "logits")} | {"bundle"}
    assert kinds <= {line.split(":")[0] for line in steps}
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

BLOCKS = 3  # of the model in the following tests but one


@pytest.fixture(scope="module")
def simulate(shallow: Shallow, tmp_path_factory: pytest.TempPathFactory, few: Path) -> Callable[..., dict[str, Any]]:
    """Build the shallow model for a simulated Orin Nano on a few digits."""
    base = tmp_path_factory.mktemp("simulated")
    work = shallow.work(base / "work")

    def run(capsys: pytest.CaptureFixture[str], name: str, *options: object) -> dict[str, Any]:
        places = ("--model", shallow.model, "--work", work, "--out", base / name)
        quick = ("--search-images", 4, "--neighbours", 0)
        common = ("--device", "orin-nano", "--precision", "fp32", "--simulate", *quick, *places)
        images = () if "--images" in options else ("--images", few)
        return row_of(capsys, "build", *common, *images, *options)

    return run


def test_weights_outside_the_onnx_travel_in_the_bundle(
    shallow: Shallow, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model too large for one ONNX file: probes, engine and bundle, which needs no work folder."""
    from edgeprune.onnx_graph import graph
    from edgeprune.pipeline.build import build
    from edgeprune.pipeline.context import Options
    from edgeprune.scheduling.goals import Goal

    monkeypatch.setattr(graph, "INLINE_BYTES", 0)
    monkeypatch.setattr("edgeprune.latency.profiling.ROUNDS", 3)
    options = Options(
        model=shallow.model, images=few, method="topk", policy="paper", block=1, goal=Goal(alpha=0.1), rounds=5,
        search_images=4, work=tmp_path / "work", out=tmp_path / "bundle",
    )  # fmt: skip
    built = build(options)
    assert next((tmp_path / "work").glob("profiling-models-*/dense-*.weights")).stat().st_size > 1 << 18
    shutil.rmtree(tmp_path / "work")
    manifest = load_bundle(built.path)
    (weights,) = (built.path / name for name in manifest.files if name.endswith(".weights"))
    model = built.path / "model.onnx"
    assert manifest.engine.size_bytes == model.stat().st_size + weights.stat().st_size > 1 << 18
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
    check_row(row, depth=BLOCKS)
    check_bundle(row, few, depth=BLOCKS)
    assert tuple(row["tokens"]) == DENSE[:BLOCKS]
    assert row["agreement"] == 100
    assert row["kl"] < 1e-6


def test_speedup_is_met(
    simulate: Callable[..., dict[str, Any]], few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "topk", "--method", "topk", "--speedup", "1.15")
    check_row(row, depth=BLOCKS)
    check_bundle(row, few, depth=BLOCKS)
    assert row["method"] == "topk"
    assert min(row["tokens"]) < DENSE[0]
    assert row["speedup"] >= 1.15 * 0.98


def test_paper_policy_cuts_once_in_block_3(
    shared: Shared, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded model, which has more than three blocks; the probes are the measured build's."""
    goal = ("--method", "pomt", "--policy", "paper", "--alpha", "0.5", "--images", few, "--search-images", 4)
    places = ("--work", shared.work, "--out", tmp_path / "paper")
    row = row_of(capsys, "build", "--device", "orin-nano", "--precision", "fp32", "--simulate", *goal, *places)
    check_row(row)
    check_bundle(row, few)
    assert row["policy"] == "paper"
    assert row["tokens"][:3] == [197] * 3
    assert row["tokens"][3] < 197
    assert len(set(row["tokens"][3:])) == 1


def test_max_drop_bounds_the_loss(
    simulate: Callable[..., dict[str, Any]], few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "evit", "--method", "evit", "--max-drop", "5", "--search-images", 21)
    check_row(row, depth=BLOCKS)
    check_bundle(row, few, searched=21, depth=BLOCKS)
    assert row["method"] == "evit"
    assert row["dense_top1"] - row["top1"] <= 5
    assert row["speedup"] > 1


def test_pictures_without_labels_give_no_top1(
    simulate: Callable[..., dict[str, Any]], few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = simulate(capsys, "loose", "--method", "none", "--images", few.parent / "images")
    check_row(row, frozenset({"top1", "dense_top1"}), BLOCKS)
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

VIT_TINY = ("--model", "vit_tiny_patch16_224", "--weights")
WEIGHTS = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"


@pytest.fixture
def big_work(tmp_path: Path) -> Iterator[Path]:
    """A work folder that does not outlive its test: its probes are large."""
    yield tmp_path / "work"
    shutil.rmtree(tmp_path / "work", ignore_errors=True)


def check_labels(bundle: Path) -> None:
    """The classes of ImageNet by name, in their order."""
    labels = json.loads((bundle / "manifest.json").read_text())["labels"]
    assert len(labels) == 1000
    assert "tench" in labels[0] and "goldfish" in labels[1] and "toilet" in labels[999]


def timm_top1(weights: Path, source: Path, indices: np.ndarray) -> float:
    """Top-1 of ViT-Tiny on some pictures of a CSV by timm's own preprocessing and forward, percent."""
    import timm
    import torch
    from PIL import Image

    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(weights)).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    hits = []
    for row in (rows[index] for index in indices):
        picture = transform(Image.open(source.parent / row["image"]).convert("RGB"))
        with torch.inference_mode():
            hits.append(int(model(picture[None]).argmax()) == int(row["label"]))
    return percent(np.array(hits))


@pytest.mark.assets
def test_vit_tiny_simulated(
    assets: Path, tmp_path: Path, big_work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every fourteenth of the pictures; which of them choose the schedule is drawn as check_bundle says."""
    search_less(monkeypatch.setattr)
    weights, every = assets / WEIGHTS, assets / "imagenet-val-650" / "labels.csv"
    header, *lines = every.read_text().splitlines()
    source, lines, searched = tmp_path / "labels.csv", lines[::14], 4
    (tmp_path / "images").mkdir()
    for line in lines:
        shutil.copy(every.parent / line.partition(",")[0], tmp_path / "images")
    source.write_text("\n".join([header, *lines]) + "\n")
    goal = ("--method", "topk", "--speedup", "1.25", "--search-images", searched, "--neighbours", "0")
    simulated = ("--device", "orin-nano", "--simulate")
    places = ("--work", big_work, "--out", tmp_path / "bundle")
    row = row_of(capsys, "build", *VIT_TINY, weights, "--images", source, *simulated, *goal, *places)
    check_row(row)
    held_out = np.random.default_rng(0).permutation(len(lines))[searched:]
    assert row["images"] == len(held_out) and row["held_out"] is True
    assert row["dense_top1"] == pytest.approx(timm_top1(weights, source, held_out), abs=1e-6)
    assert row["speedup"] >= 1.25 * 0.98
    check_labels(tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.assets
def test_vit_tiny_measured(assets: Path, tmp_path: Path, big_work: Path) -> None:
    images = assets / "imagenet-val-650" / "labels.csv"
    model = (*VIT_TINY, assets / WEIGHTS, "--images", images)
    goal = ("--method", "pomt", "--speedup", "1.25", "--search-images", "8", "--rounds", "15", "--neighbours", "1")
    done = start("build", *model, *goal, "--work", big_work, "--out", tmp_path / "bundle", "--json", env=OFFLINE)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    check_row(row)
    assert row["images"] == 650 - 8 and row["held_out"] is True
    assert row["dense_top1"] == pytest.approx(82.77, abs=0.5)  # timm's own evaluation of all of these images
    assert row["speedup"] > 1.1
    check_labels(tmp_path / "bundle")
