"""Dense features through the command line: several layers, a head on them, several outputs everywhere."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.builds import Shallow, as_measured, call, few_digits, row_of
from support.evaluation import labelled
from support.loopback import check_ships

import edgeprune
from edgeprune.bundles.format import load_bundle
from edgeprune.errors import InputError
from edgeprune.io import load
from edgeprune.records import BuildTrace
from edgeprune.scheduling.goals import Goal
from edgeprune.vit import recovery

COUNT, SEARCHED = 60, 12
SIMULATED = ("--simulate", "--device", "orin-nano", "--batch", "32", "--method", "topk")
QUICK = ("--search-images", str(SEARCHED), "--rounds", "5", "--neighbours", "1")
WEIGHT = np.random.default_rng(0).standard_normal((64, 2), dtype=np.float32)
SHAPES = {"features_2": (14, 14, 64), "features_3": (14, 14, 64), "embedding": (10,)}


class Pictures(NamedTuple):
    digits: Path
    head: Path
    work: Path


def head_of(path: Path, name: str = "features_3", batch: int | str = "pictures", width: int = 64) -> Path:
    """A head as ONNX: two numbers for every patch."""
    node = helper.make_node("MatMul", [name, "weight"], ["map"], "head")
    entering = helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 14, 14, width])
    leaving = helper.make_tensor_value_info("map", TensorProto.FLOAT, [batch, 14, 14, 2])
    weights = [numpy_helper.from_array(np.resize(WEIGHT, (width, 2)), "weight")]
    graph = helper.make_graph([node], "head", [entering], [leaving], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    base = tmp_path_factory.mktemp("dense")
    return Pictures(few_digits(base / "digits", COUNT), head_of(base / "head.onnx"), base / "work")


@pytest.fixture(scope="module")
def built(shallow: Shallow, given: Pictures, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle with a head, and its row."""
    folder = tmp_path_factory.mktemp("built")
    command = ["build", *SIMULATED, *QUICK, "--model", shallow.model, "--images", given.digits, "--speedup", "1.4"]
    command += ["--layers", "2,3", "--head", given.head, "--work", given.work, "--out", folder / "bundle", "--json"]
    from support import processes

    code, out, err = processes.command(folder, *command)
    assert code == 0, err
    return folder / "bundle", json.loads(out.splitlines()[-1])


def outputs_of(model: Path, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of an ONNX file by name, batch by batch."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names, size = [o.name for o in session.get_outputs()], session.get_inputs()[0].shape[0]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, len(pictures), size):
        part = pictures[start : start + size]
        fed = np.resize(part, (size, *part.shape[1:]))
        for name, found in zip(names, session.run(None, {"images": fed}), strict=True):
            rows[name].append(found[: len(part)])
    return {name: np.concatenate(found) for name, found in rows.items()}


def unpruned(given: Pictures) -> dict[str, np.ndarray]:
    """Of plain timm, through its final norm."""
    import torch
    from support import processes

    module, pictures = processes.shallow_vit(3), torch.from_numpy(labelled(given.digits)[0])
    with torch.inference_mode():
        two, three = module.forward_intermediates(
            pictures, indices=[1, 2], norm=True, output_fmt="NCHW", intermediates_only=True
        )
        embedding = module(pictures)
    return {
        "features_2": two.permute(0, 2, 3, 1).numpy(), "features_3": three.permute(0, 2, 3, 1).numpy(),
        "embedding": embedding.numpy(),
    }  # fmt: skip


def length(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def test_figures_are_those_of_the_engine_on_the_other_pictures(
    given: Pictures, built: tuple[Path, dict[str, Any]]
) -> None:
    bundle, row = built
    kept = np.random.default_rng(0).permutation(COUNT)[SEARCHED:]
    before = {name: each[kept] for name, each in unpruned(given).items()}
    after = {n: each[kept] for n, each in outputs_of(bundle / "model.onnx", labelled(given.digits)[0]).items()}
    assert {name: each.shape[1:] for name, each in after.items()} == SHAPES
    found = row["fidelity"]
    assert found["task"] == "dense" and row["images"] == len(kept) and row["held_out"]
    assert (row["kl"], row["agreement"], row["top1"], row["dense_top1"]) == (None,) * 4
    for each in found["layers"]:
        a, b = (side[f"features_{each['layer']}"] for side in (before, after))
        assert each["error"] == pytest.approx(length(b - a) / length(a), rel=1e-3)
        cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert each["cosine"] == pytest.approx(cosines.mean(), abs=1e-4)
    assert [each["layer"] for each in found["layers"]] == [2, 3]
    maps = [side["features_3"] @ WEIGHT for side in (before, after)]
    assert (
        found["error"] == found["head_error"] == pytest.approx(length(maps[1] - maps[0]) / length(maps[0]), rel=1e-3)
    )
    assert 0.005 < found["error"] < 0.9
    assert found["head_difference"] == pytest.approx(np.abs(maps[1] - maps[0]).mean(), rel=1e-3)
    assert 1.3 < row["speedup"] < 2 and row["prefix_last"] is False


def test_the_bundle_verifies_runs_and_goes_to_triton(
    given: Pictures, built: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, _ = built
    manifest = load_bundle(bundle)
    assert (manifest.task, manifest.labels, manifest.vit.layers) == ("dense", (), (2, 3))
    assert np.load(bundle / "golden_output.npy").shape == (32, sum(map(np.prod, SHAPES.values())))
    assert row_of(capsys, "verify", bundle)["ok"]

    wanted = outputs_of(bundle / "model.onnx", labelled(given.digits)[0])
    found = row_of(capsys, "run", bundle, given.digits, "--out", tmp_path / "features")
    assert found["task"] == "dense" and len(found["rows"]) == COUNT
    for index, entry in enumerate(found["rows"]):
        assert entry["file"] == str(tmp_path / "features" / f"{Path(entry['image']).stem}.npz")
        with np.load(entry["file"]) as saved:
            assert set(saved) == set(SHAPES)
            for name in SHAPES:
                np.testing.assert_allclose(saved[name], wanted[name][index], atol=1e-4)
    pictures = sorted((given.digits.parent / "images").iterdir())
    [entry] = row_of(capsys, "run", bundle, pictures[0])["rows"]
    assert entry["features"] == {"features_2": [14, 14, 64], "features_3": [14, 14, 64]} and "file" not in entry
    [first] = edgeprune.Bundle.load(bundle).predict(pictures[0]).rows
    assert {name: each.shape for name, each in first.features.items()} == {n: SHAPES[n] for n in first.features}
    code, _, err = call(capsys, "run", bundle, pictures[0], pictures[0], "--out", tmp_path / "twice")
    assert code == 1 and "several pictures would be saved as" in err and not (tmp_path / "twice").exists()

    code, _, err = call(capsys, "export-triton", as_measured(bundle, tmp_path / "copy"), tmp_path / "models")
    [entry] = (tmp_path / "models").iterdir()
    config = (entry / "config.pbtxt").read_text()
    assert code == 0 and config.count("output [") == 3, err
    for name, shape in SHAPES.items():
        assert f'"{name}" data_type: TYPE_FP32 dims: {[32, *shape]}' in config

    page = (bundle / "report.html").read_text()
    for text in ("features of layer 2, relative error", "features of layer 3, mean cosine", "head's output"):
        assert text.replace("'", "&#39;") in page, text
    assert "squared relative error over predicted latency" in page and "KL" not in page and "predict " not in page
    code, out, _ = call(capsys, "report", bundle)
    assert code == 0 and str(bundle / "report.html") in out

    there = row_of(
        capsys, "compile", bundle / "model.onnx", "--images", given.digits, "--dense", bundle / "model.onnx",
        "--rounds", "5", "--work", tmp_path / "w", "--out", tmp_path / "there",
    )  # fmt: skip
    assert there["fidelity"]["error"] == 0 and len(there["fidelity"]["layers"]) == 2
    check_ships(tmp_path / "there", tmp_path)


def test_what_is_profiled_has_the_features_and_cuts_that_restore_them(
    given: Pictures, built: tuple[Path, dict[str, Any]]
) -> None:
    [folder] = given.work.glob("profiling-models-*")
    assert not (folder / "last.onnx").exists(), "every token of the last block is needed"
    graphs = {path.name: onnx.load(path, load_external_data=False).graph for path in folder.glob("*.onnx")}
    for name in ("fixed.onnx", "dense.onnx"):
        assert [output.name for output in graphs[name].output] == list(SHAPES)
    norms = [node for node in graphs["fixed.onnx"].node if node.op_type == "LayerNormalization"]
    assert len(norms) == 3, "each layer has its own"
    cuts = [graph for name, graph in graphs.items() if name.startswith("cut-topk")]
    assert len(cuts) == 2
    for graph in cuts:
        assert [d.dim_value for d in graph.output[1].type.tensor_type.shape.dim] == [32, 196, 64]
        kinds = [node.op_type for node in graph.node]
        first = graph.input[0].type.tensor_type.shape.dim[1].dim_value == 197
        assert kinds.count("ArgMax") == 1 and kinds.count("Gather") >= (3 if first else 5)


def test_verify_sees_one_output_that_is_off(
    built: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from edgeprune.io import sha256_file

    bundle = tmp_path / "bundle"
    shutil.copytree(built[0], bundle)
    golden = np.load(bundle / "golden_output.npy")
    golden[:, : 14 * 14 * 64] *= 1.01  # the features of layer 2
    np.save(bundle / "golden_output.npy", golden)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["golden_output.npy"] = sha256_file(bundle / "golden_output.npy")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = call(capsys, "verify", bundle)
    assert code == 1 and "output: expected within 0.001 of the golden output, found 0.0099 from it" in err, err


def test_the_fastest_schedule_within_that_error_is_chosen(
    shallow: Shallow, given: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("build", *SIMULATED, *QUICK, "--model", shallow.model, "--images", given.digits, "--layers", "3,2")
    places = ("--work", given.work, "--out", tmp_path / "bundle")
    row = row_of(capsys, *command, "--neighbours", "0", "--max-error", "0.15", *places)
    trace = load(tmp_path / "bundle" / "story.json", BuildTrace)
    chosen = next(c for c in trace.candidates if c.tokens == tuple(row["tokens"]))
    good = [c for c in trace.candidates if c.error is not None and c.error <= 0.15]
    assert chosen in good and 1 < len(good) < len(trace.candidates)
    assert chosen.predicted_ms <= 1.02 * min(c.predicted_ms for c in good) and row["speedup"] > 1.02
    assert trace.asked == "a relative error of at most 0.15" and row["fidelity"]["head_error"] is None


def test_compare_gives_the_figures_of_features(
    shallow: Shallow, given: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("compare", *SIMULATED[:-2], *QUICK[:-2], "--model", shallow.model, "--images", given.digits)
    options = ("--layers", "2,3", "--methods", "topk", "--speedup", "1.4", "--work", given.work)
    code, out, err = call(capsys, *command, *options, "--plot", tmp_path / "plot.svg", "--json")
    assert code == 0 and "relative error" in err and "KL" not in err, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert {row["policy"] for row in rows} == {"search", "published"} and (tmp_path / "plot.svg").stat().st_size
    assert all(0 < row["fidelity"]["error"] < 1 and row["fidelity"]["task"] == "dense" for row in rows)


def test_what_does_not_fit_is_refused_in_one_line(
    shallow: Shallow, given: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "texts.npy", np.ones((10, 10), np.float32))
    (tmp_path / "head.pt").write_bytes(b"no ONNX")
    (tmp_path / "broken.onnx").write_bytes(b"no ONNX")
    wide, other = head_of(tmp_path / "wide.onnx", width=32), head_of(tmp_path / "other.onnx", "features_1")
    layers = ("--layers", "2,3")
    cases: dict[str, tuple[object, ...]] = {
        "layer 4 is out of range: pass --layers of the blocks 1 to 3": ("--layers", "4"),
        "layer 0 is out of range": ("--layers", "0,2"),
        "--layers 'a,b': pass block numbers such as": ("--layers", "a,b"),
        "--layers is for dense features: pass --task dense instead of embed": (*layers, "--task", "embed"),
        "--head is for dense features: pass --task dense instead of classify": (
            "--head", given.head, "--task", "classify",
        ),
        "no such file: pass --head HEAD.onnx": (*layers, "--head", tmp_path / "absent.onnx"),
        "head.pt is not ONNX: write the head with torch.onnx.export": (*layers, "--head", tmp_path / "head.pt"),
        "broken.onnx: not an ONNX file": (*layers, "--head", tmp_path / "broken.onnx"),
        "takes features_3 (pictures, 14, 14, 32) in tensor(float), the model gives features_3 (B, 14, 14, 64)": (
            *layers, "--head", wide,
        ),
        "takes features_1, the model gives features_2, features_3, embedding": (*layers, "--head", other),
        "--max-drop does not apply to dense features: pass --max-error": (*layers, "--max-drop", "1"),
        "--min-cosine is for embeddings, but shallow gives dense features": (*layers, "--min-cosine", "0.9"),
        "--max-error is for dense features, but shallow classifies": ("--max-error", "0.1"),
        "--policy paper does not apply to dense features": (*layers, "--policy", "paper"),
        "--text-embeddings is for embeddings, but shallow gives dense": (
            *layers, "--text-embeddings", tmp_path / "texts.npy",
        ),
    }  # fmt: skip
    for message, options in cases.items():
        command = ("build", *SIMULATED, "--model", shallow.model, "--images", given.digits, *options)
        code, out, err = call(capsys, *command, "--work", tmp_path / "work", "--out", tmp_path / "bundle")
        assert code == 1 and out == "" and message in err.splitlines()[-1], err
        assert not (tmp_path / "bundle").exists()
    with pytest.raises(InputError, match="--max-error is for dense features"):
        edgeprune.build(shallow.model, device="orin-nano", simulate=True, images=given.digits, goal=Goal(max_error=1))


def test_recovery_lowers_the_error_of_the_features(
    shallow: Shallow, given: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On half of the pictures; the others give figures with and without, in the row, on the page and in the table."""
    recipe = partial(recovery.Recipe, epochs=3, least_steps=0, rate=4e-4, batch=8)
    monkeypatch.setattr(recovery, "Recipe", recipe)
    command = ["build", *SIMULATED, *QUICK, "--model", shallow.model, "--images", given.digits, "--speedup", "1.4"]
    command += [
        "--neighbours",
        "0",
        "--layers",
        "2,3",
        "--work",
        given.work,
        "--out",
        tmp_path / "bundle",
        "--recover",
    ]
    row = row_of(capsys, *command)
    before, after = row["unrecovered"], row["fidelity"]
    assert row["recovery"]["task"] == "dense" and row["recovery"]["epochs"]
    assert after["error"] < before["error"] == before["features"]["error"]
    assert 0 < before["error_error"] < before["error"]
    assert (before["kl"], before["agreement"], row["recovery"]["kl_after"]) == (None, None, None)
    page = (tmp_path / "bundle" / "report.html").read_text()
    assert "without recovery" in page and f"{before['features']['layers'][0]['error']:.4f}" in page


def test_profile_schedule_and_export_one_by_one(
    shallow: Shallow, given: Pictures, built: tuple[Path, dict[str, Any]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With the layers of the build, whose work they find; without them each says what is missing."""
    model, places = ("--model", shallow.model), ("--work", given.work)
    stairs, schedule = tmp_path / "stairs.json", tmp_path / "schedule.json"
    row_of(capsys, "profile", *SIMULATED, *model, "--layers", "2,3", *places, "--out", stairs)
    asked = ("schedule", stairs, *model, "--images", given.digits, "--method", "topk", *QUICK[:2], "--speedup", "1.4")
    asked += ("--work", given.work, "--out", schedule)
    code, _, err = call(capsys, *asked)
    assert code == 1 and "is of a model with --layers 2,3, this one has no --layers: pass the same" in err
    found = row_of(capsys, *asked, "--layers", "2,3", "--head", given.head)
    assert found["tokens"][-1] < 197
    export = ("export", *model, "--schedule", schedule, "--out", tmp_path / "m.onnx")
    code, _, err = call(capsys, *export, "--layers", "3")
    assert code == 1 and "is for --layers 2,3, this model has --layers 3: pass the same --layers to export" in err
    row_of(capsys, *export, "--layers", "2,3")
    assert [output.name for output in onnx.load(tmp_path / "m.onnx").graph.output] == list(SHAPES)


def test_a_head_with_one_input_and_a_fixed_batch_may_have_any_names(given: Pictures, tmp_path: Path) -> None:
    from edgeprune.runtimes.head import Head
    from edgeprune.vit.models import load_model

    vit = load_model("vit_digits", layers=(12,)).vit
    features = np.random.default_rng(0).standard_normal((5, 14, 14, 64), dtype=np.float32)
    fixed = Head(head_of(tmp_path / "fixed.onnx", "anything", 2), vit)
    np.testing.assert_allclose(fixed({"features_12": features}), features @ WEIGHT, rtol=1e-4, atol=1e-4)
    assert fixed.key != Head(head_of(tmp_path / "any.onnx", "anything"), vit).key
