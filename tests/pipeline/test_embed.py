"""A model without a head through the command line: embeddings in, embeddings out, no class names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from support import processes
from support.builds import as_measured, call, few_digits, row_of
from support.evaluation import labelled, logits_of
from support.loopback import check_ships

import edgeprune
from edgeprune import zoo
from edgeprune.bundles.format import load_bundle
from edgeprune.errors import InputError
from edgeprune.io import load
from edgeprune.records import BuildTrace, EmbedFidelity, Manifest, ModelMetadata
from edgeprune.scheduling.goals import Goal

COUNT = 80
SIMULATED = ("--simulate", "--device", "orin-nano", "--batch", "32", "--method", "topk")
SEARCHED = ("--search-images", "12", "--rounds", "5", "--neighbours", "1")


class Headless(NamedTuple):
    """Three blocks of the embedded model without their head, and digits."""

    model: str
    module: Any
    digits: Path
    work: Path


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Headless:
    import torch
    from safetensors.torch import save_file

    base = tmp_path_factory.mktemp("headless")
    module = processes.shallow_vit(3)
    module.reset_classifier(0)
    folder = base / "headless"
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    shape = {"img_size": 28, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    how = {**zoo.vit_digits().pretrained_cfg, "num_classes": 0}
    del how["architecture"]
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": shape, "pretrained_cfg": how}
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(module, torch.nn.Module)
    return Headless(f"local-dir:{folder}", module.eval(), few_digits(base / "digits", COUNT), base / "work")


@pytest.fixture(scope="module")
def built(headless: Headless, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle and its row."""
    folder = tmp_path_factory.mktemp("built")
    command = (
        "build", *SIMULATED, *SEARCHED, "--model", headless.model, "--images", headless.digits, "--speedup", "1.5",
        "--work", headless.work, "--out", folder / "bundle", "--json",
    )  # fmt: skip
    code, out, err = processes.command(folder, *command)
    assert code == 0, err
    return folder / "bundle", json.loads(out.splitlines()[-1])


def dense_embeddings(headless: Headless) -> np.ndarray:
    """Of plain timm."""
    import torch

    with torch.inference_mode():
        found: np.ndarray = headless.module(torch.from_numpy(labelled(headless.digits)[0])).numpy()
    return found


def test_figures_are_those_of_the_engine_on_the_other_pictures(
    headless: Headless, built: tuple[Path, dict[str, Any]]
) -> None:
    bundle, row = built
    pictures, labels = labelled(headless.digits)
    kept = np.random.default_rng(0).permutation(COUNT)[12:]
    rows = {"dense": dense_embeddings(headless)[kept], "pruned": logits_of(bundle / "model.onnx", pictures)[kept]}
    unit = {name: each / np.linalg.norm(each, axis=1, keepdims=True) for name, each in rows.items()}
    cosines = (unit["dense"] * unit["pruned"]).sum(1)
    near = {}
    for name, each in unit.items():
        similar = each @ each.T
        np.fill_diagonal(similar, -2)
        near[name] = np.argsort(-similar, axis=1)
    found = row["fidelity"]
    assert found["task"] == "embed" and row["images"] == len(kept) and row["held_out"]
    assert found["cosine"] == pytest.approx(cosines.mean(), abs=1e-5) and found["cosine"] < 0.9999
    assert found["cosine_p1"] == pytest.approx(np.percentile(cosines, 1), abs=1e-4)
    same = 100 * (near["dense"][:, 0] == near["pruned"][:, 0]).mean()
    assert found["neighbour_agreement"] == row["agreement"] == pytest.approx(same)
    five = [len({*a[:5]} & {*b[:5]}) / 5 for a, b in zip(near["dense"], near["pruned"], strict=True)]
    assert found["recall5"] == pytest.approx(100 * np.mean(five))
    assert row["kl"] is None and row["top1"] == found["knn_top1"] and row["dense_top1"] == found["dense_knn_top1"]
    nearest_label = labels[kept][near["dense"][:, 0]] == labels[kept]
    assert abs(row["dense_top1"] - 100 * nearest_label.mean()) < 15, "the vote of five is near that of the first"
    assert 1.4 < row["speedup"] < 2


def test_the_bundle_verifies_runs_and_goes_to_triton(
    headless: Headless, built: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, _ = built
    manifest = load_bundle(bundle)
    assert (manifest.task, manifest.labels, manifest.vit.classes) == ("embed", (), 64)
    assert row_of(capsys, "verify", bundle)["ok"]
    found = row_of(capsys, "run", bundle, headless.digits)
    wanted = logits_of(bundle / "model.onnx", labelled(headless.digits)[0])
    assert found["task"] == "embed" and len(found["rows"]) == COUNT
    for entry, embedding in zip(found["rows"], wanted, strict=True):
        assert set(entry) == {"image", "norm", "embedding"}
        assert entry["embedding"] == pytest.approx(embedding.tolist(), abs=1e-4)
        assert entry["norm"] == pytest.approx(np.linalg.norm(embedding), rel=1e-4)
    code, out, _ = call(capsys, "run", bundle, headless.digits.parent / "images")
    assert code == 0 and "norm of the embedding" in out and "class" not in out
    [first] = edgeprune.Bundle.load(bundle).predict(sorted((headless.digits.parent / "images").iterdir())[0]).rows
    assert first.top == () and first.embedding is not None and len(first.embedding) == 64

    code, _, err = call(capsys, "export-triton", as_measured(bundle, tmp_path / "copy"), tmp_path / "models")
    [entry] = (tmp_path / "models").iterdir()
    config = (entry / "config.pbtxt").read_text()
    assert code == 0 and not (entry / "labels.txt").exists() and "label" not in config, err
    assert '"embedding"' in config and "dims: [32, 64]" in config

    page = (bundle / "report.html").read_text()
    assert "mean cosine to the unpruned embedding" in page and "1 − cosine over predicted latency" in page
    assert "predict " not in page and "predicts " not in page and "KL" not in page
    code, out, _ = call(capsys, "report", bundle)
    assert code == 0 and str(bundle / "report.html") in out

    there = row_of(
        capsys, "compile", bundle / "model.onnx", "--images", headless.digits, "--rounds", "5",
        "--work", tmp_path / "w", "--out", tmp_path / "there",
    )  # fmt: skip
    assert load_bundle(tmp_path / "there").task == "embed"
    assert there["fidelity"]["knn_top1"] is not None and there["fidelity"]["cosine"] is None
    check_ships(tmp_path / "there", tmp_path)


def test_the_fastest_schedule_with_that_cosine_is_chosen(
    headless: Headless, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("build", *SIMULATED, *SEARCHED, "--model", headless.model, "--images", headless.digits)
    places = ("--work", headless.work, "--out", tmp_path / "bundle")
    row = row_of(capsys, *command, "--neighbours", "0", "--min-cosine", "0.97", *places)
    trace = load(tmp_path / "bundle" / "story.json", BuildTrace)
    chosen = next(c for c in trace.candidates if c.tokens == tuple(row["tokens"]))
    good = [c for c in trace.candidates if (c.cosine or 0) >= 0.97]
    assert chosen in good and len(good) < len(trace.candidates)
    assert chosen.predicted_ms <= 1.02 * min(c.predicted_ms for c in good) and row["speedup"] > 1.05
    assert trace.asked == "a mean cosine of at least 0.97"


def test_compare_gives_the_figures_of_embeddings(
    headless: Headless, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("compare", *SIMULATED[:-2], *SEARCHED[:-2], "--model", headless.model, "--images", headless.digits)
    options = ("--methods", "topk", "--speedup", "1.5", "--work", headless.work, "--plot", tmp_path / "plot.svg")
    code, out, err = call(capsys, *command, *options, "--json")
    assert code == 0 and "k-NN top-1" in err and "KL" not in err, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert {row["policy"] for row in rows} == {"search", "published"} and (tmp_path / "plot.svg").stat().st_size
    for row in rows:
        assert row["fidelity"]["task"] == "embed" and 0.9 < row["fidelity"]["cosine"] < 1 and row["kl"] is None
        assert row["dense_top1"] == row["fidelity"]["dense_knn_top1"] > 90


def test_zero_shot_figures_with_text_embeddings(
    headless: Headless, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head of the embedded model stands for the texts."""
    texts = np.asarray(processes.shallow_vit(3).head.weight.detach())
    np.save(tmp_path / "texts.npy", texts)
    command = (
        "build",
        *SIMULATED,
        *SEARCHED,
        "--model",
        headless.model,
        "--images",
        headless.digits,
        "--speedup",
        "1.5",
    )
    command += ("--work", headless.work, "--out", tmp_path / "bundle", "--text-embeddings")
    found = row_of(capsys, *command, tmp_path / "texts.npy")["fidelity"]
    pictures, labels = labelled(headless.digits)
    kept = np.random.default_rng(0).permutation(COUNT)[12:]
    rows = dense_embeddings(headless)[kept], logits_of(tmp_path / "bundle" / "model.onnx", pictures)[kept]
    before, after = ((each @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T).argmax(1) for each in rows)
    assert found["zero_shot_agreement"] == pytest.approx(100 * (before == after).mean())
    assert found["zero_shot_top1"] == pytest.approx(100 * (after == labels[kept]).mean())
    assert found["dense_zero_shot_top1"] == pytest.approx(100 * (before == labels[kept]).mean())
    assert found["dense_zero_shot_top1"] > 80
    assert "zero-shot top-1" in (tmp_path / "bundle" / "report.html").read_text()

    wrong = {
        "not (classes, 64): pass the text": np.ones((10, 63), np.float32),
        "has the shape (64,)": np.ones(64, np.float32),
        "not finite": np.full((10, 64), np.nan, np.float32),
        "which has 4: pass one row for every class": np.ones((4, 64), np.float32),
        "not an fp32 array": np.ones((10, 64)),
    }
    for message, array in wrong.items():
        np.save(tmp_path / "wrong.npy", array)
        code, _, err = call(capsys, *command, tmp_path / "wrong.npy")
        assert code == 1 and message in err.splitlines()[-1], err
    code, _, err = call(capsys, "build", "--text-embeddings", tmp_path / "texts.npy", "--work", tmp_path / "work")
    assert code == 1 and "--text-embeddings is for embeddings" in err.splitlines()[-1]


def test_recovery_lowers_the_distance_of_embeddings(headless: Headless) -> None:
    from edgeprune.images import load_pixels
    from edgeprune.vit.fidelity import pruned_module
    from edgeprune.vit.models import load_model
    from edgeprune.vit.recovery import Recipe, recovered

    model = load_model(headless.model)
    assert model.task == "embed"
    pruned = pruned_module(model, "topk", (40, 10, 5))
    paths = sorted((headless.digits.parent / "images").iterdir())[:48]
    found = recovered(pruned, load_pixels(paths, model.preprocessing), model.preprocessing,
                      Recipe(epochs=12, least_steps=0, rate=4e-4, warmup=4), task=model.task)  # fmt: skip
    record = found.record
    assert record.epochs and record.curve[record.epochs] < record.curve[0] < 2
    assert (record.task, record.kl_before, record.kl_after) == ("embed", None, None)


def test_what_does_not_fit_the_task_is_refused_in_one_line(
    headless: Headless, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = few_digits(tmp_path / "few", 5)
    cases: dict[str, tuple[object, ...]] = {
        "--min-cosine is for embeddings, but vit_digits classifies": ("--min-cosine", "0.9"),
        "unknown task 'depth': choose from classify, embed": ("--task", "depth"),
        "at least 6 pictures, not 5": ("--model", headless.model, "--images", few),
        "at least 6 pictures, not 3": ("--task", "embed", "--search-images", "3"),
        "has no accuracy bound: pass --policy search with --min-cosine": (
            "--model", headless.model, "--images", headless.digits, *SIMULATED, "--policy", "paper", "--block", "1",
            "--min-cosine", "0.9",
        ),
    }  # fmt: skip
    for message, options in cases.items():
        places = ("--work", headless.work, "--out", tmp_path / "bundle")
        code, out, err = call(capsys, "build", "--simulate", "--device", "orin-nano", *options, *places)
        assert code == 1 and out == "" and message in err.splitlines()[-1], err
        assert not (tmp_path / "bundle").exists()
    code, _, err = call(capsys, "build", "--min-cosine", "0.9", "--speedup", "2")
    assert code == 2 and "2 goals: set only one" in err
    with pytest.raises(InputError, match="is for embeddings"):
        edgeprune.build(device="orin-nano", simulate=True, goal=Goal(min_cosine=0.9), work=tmp_path / "work")


def test_files_of_earlier_versions_are_of_classes(built: tuple[Path, dict[str, Any]]) -> None:
    manifest = json.loads((built[0] / "manifest.json").read_text())
    fidelity = manifest["report"].pop("fidelity")
    assert msgspec.convert(fidelity, EmbedFidelity).recall5 == fidelity["recall5"]
    del manifest["task"]
    manifest["labels"] = list(map(str, range(64)))
    assert msgspec.convert(manifest, Manifest).task == "classify"
    fields = ("vit", "schedule", "preprocessing", "labels")
    assert msgspec.convert({name: manifest[name] for name in fields}, ModelMetadata).task == "classify"
