"""The command line: exit codes, the JSON of each command, and the half of it that runs without torch."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
from safetensors.torch import save_file
from support import processes
from support.builds import Shallow, Shared, call, check_row, few_digits, program, row_of, start, without_torch
from support.evaluation import DENSE, dense_logits, expected_tokens, labelled, logits_of, normalised_tokens

from edgeprune import __version__, zoo
from edgeprune.devices import load_device, names
from edgeprune.io import load
from edgeprune.latency.staircase import treads
from edgeprune.records import Schedule, Staircase

SIMULATED = [name for name in names() if load_device(name).simulation]
COMMANDS = ("build", "profile", "schedule", "export", "compile", "bench", "compare", "devices", "doctor")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 21 digits."""
    return few_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def staircase(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated staircase of the embedded model on an Orin Nano."""
    path = tmp_path_factory.mktemp("staircase") / "staircase.json"
    done = start("profile", "--simulate", "--device", "orin-nano", "--out", path)
    assert done.returncode == 0, done.stderr
    return path


# --- exit codes and where output goes ---


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    code = """
import sys
from edgeprune.cli import main
sys.argv = ["edgeprune", "--help"]
try:
    main()
finally:
    heavy = {"torch", "timm", "onnx", "onnxruntime", "jinja2", "numpy", "PIL", "msgspec"} & set(sys.modules)
    print("HEAVY", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", done.stdout), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, command, "--help")
    assert code == 0 and not err
    assert "--json" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"edgeprune {__version__}\n", "")


BAD_USAGE = {
    "no command": (),
    "unknown command": ("sculpt",),
    "unknown option": ("build", "--fast"),
    "no number": ("build", "--batch", "two"),
    "two goals": ("build", "--speedup", "1.2", "--budget-ms", "3"),
    "two other goals": ("schedule", "s.json", "--alpha", "0.5", "--max-drop", "1"),
    "slower, please": ("build", "--speedup", "0.5"),
    "no time": ("build", "--budget-ms", "0"),
    "speed-up that is no number": ("build", "--speedup", "nan"),
    "alpha above 1": ("build", "--alpha", "1.5"),
    "negative drop": ("build", "--max-drop", "-1"),
    "too few rounds": ("build", "--rounds", "1"),
    "no bundle": ("bench",),
    "no staircase": ("schedule",),
    "nothing to export": ("export",),
    "two things to export": ("export", "--dense", "--trunk"),
    "targets that are no numbers": ("compare", "--speedup", "fast"),
}


@pytest.mark.parametrize("argv", BAD_USAGE.values(), ids=BAD_USAGE.keys())
def test_bad_usage_exits_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *argv)
    assert code == 2
    assert "Traceback" not in out + err
    assert "Usage" in out + err
    assert argv == () or (err and not out)


def test_user_error_exits_1_with_one_line() -> None:
    done = start("build", "--device", "toaster")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "toaster" in done.stderr and "orin-nano" in done.stderr


def test_progress_shows_on_a_terminal_and_vanishes_elsewhere(tmp_path: Path) -> None:
    command = program("profile", "--simulate", "--device", "orin-nano", "--exhaustive", "--out", tmp_path / "s.json")
    plain = subprocess.run(command, capture_output=True, timeout=300)
    assert plain.returncode == 0
    assert plain.stderr == b""
    assert b"\x1b" not in plain.stdout
    leader, follower = pty.openpty()
    seen: list[bytes] = []

    def drain() -> None:
        try:
            while part := os.read(leader, 4096):
                seen.append(part)
        except OSError:  # the last writer has closed its end
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, env=os.environ | {"TERM": "xterm"})
    os.close(follower)
    reader.join()
    os.close(leader)
    assert shown.returncode == 0
    assert b"token counts" in b"".join(seen) and b"\x1b" in b"".join(seen)
    assert shown.stdout == plain.stdout


# --- the JSON of each command ---


def test_devices_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = row_of(capsys, "devices")["devices"]
    assert [row["name"] for row in rows] == list(names())
    orin = next(row for row in rows if row["name"] == "orin-nano")
    assert (orin["sm_count"], orin["runtime"], orin["simulation"]) == (8, "trt", True)
    old = next(row for row in rows if row["name"] == "jetson-tx2")
    assert old["build"] is False and old["reason"]


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    checks = row_of(capsys, "doctor")["checks"]
    by_name = {check["name"]: check for check in checks}
    assert {"edgeprune", "numpy", "torch", "onnxruntime", "tensorrt", "machine", "governor"} <= set(by_name)
    assert {check["status"] for check in checks} <= {"ok", "info", "warning"}
    assert all(set(check) == {"name", "status", "detail"} and check["detail"] for check in checks)
    assert by_name["numpy"]["detail"] == np.__version__
    assert by_name["edgeprune"]["detail"].startswith(__version__)


@pytest.mark.parametrize("device", SIMULATED)
def test_profile_simulates_each_device(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = row_of(capsys, "profile", "--device", device, "--simulate", "--out", tmp_path / "s.json")
    assert (row["device"], row["model"], row["runtime"]) == (device, "vit_digits", "simulated")
    assert row["simulated"] is True
    assert row["probes"] == len(row["points"]) > 3
    counts = [point["tokens"] for point in row["points"]]
    assert counts == sorted(set(counts)) and counts[-1] == 197
    assert row["treads"] == sorted(set(row["treads"])) and set(row["treads"]) <= set(counts)
    assert row["treads"][-1] == 197 and len(row["treads"]) > 1
    for point in row["points"]:
        assert set(point) == {"tokens", "median_ms", "low", "high"}
        assert 0 < point["low"] <= point["median_ms"] <= point["high"]
    saved = load(Path(row["path"]), Staircase)
    assert [p.tokens for p in saved.points] == counts
    assert "SIMULATED" in (tmp_path / "s.svg").read_text()


def test_exhaustive_probes_every_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("profile", "--device", "orin-nano", "--simulate", "--out", tmp_path / "s.json")
    adaptive, every = (row_of(capsys, *common, *extra) for extra in ((), ("--exhaustive",)))
    counts = [point["tokens"] for point in every["points"]]
    assert counts == list(range(counts[0], 198)) and counts[0] <= 20
    latency = {point["tokens"]: point["median_ms"] for point in every["points"]}
    assert adaptive["probes"] * 3 < every["probes"]
    assert all(latency[p["tokens"]] == p["median_ms"] for p in adaptive["points"])
    assert set(adaptive["treads"]) <= set(every["treads"])  # no step is invented
    steps = [n for n, m in itertools.pairwise(counts) if latency[n] < latency[m]]
    assert every["treads"] == [*steps, 197]  # right ends: one more token costs more


def test_export_dense(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = row_of(capsys, "export", "--dense", "--batch", "2", "--out", tmp_path / "dense.onnx")
    assert row["path"] == str(tmp_path / "dense.onnx")
    assert row["size_bytes"] == (tmp_path / "dense.onnx").stat().st_size
    assert (row["model"], row["batch"]) == ("vit_digits", 2)
    (entry,) = onnxruntime.InferenceSession(row["path"]).get_inputs()
    assert entry.shape == [2, 3, 28, 28]
    pictures, _ = labelled(few)
    np.testing.assert_allclose(logits_of(Path(row["path"]), pictures), dense_logits(few), atol=1e-4)
    assert normalised_tokens(Path(row["path"])) == expected_tokens(list(DENSE), False)


def test_schedule_then_export(
    staircase: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.search_less(monkeypatch.setattr)
    goal = ("--method", "topk", "--speedup", "1.3", "--images", few, "--search-images", "4")
    places = ("--work", tmp_path / "work", "--out", tmp_path / "schedule.json")
    row = row_of(capsys, "schedule", staircase, *goal, *places)
    assert (row["model"], row["method"], row["policy"]) == ("vit_digits", "topk", "search")
    assert row["predicted_speedup"] >= 1.3
    saved = load(Path(row["path"]), Schedule)
    assert list(saved.tokens) == row["tokens"] and saved.predicted_ms == row["predicted_ms"]
    assert set(row["tokens"]) <= set(treads(load(staircase, Staircase)))  # not all of them are confirmed
    model = row_of(capsys, "export", "--schedule", row["path"], "--out", tmp_path / "pruned.onnx")["path"]
    assert normalised_tokens(Path(model)) == expected_tokens(row["tokens"], saved.prefix_last)
    pictures, labels = labelled(few)
    logits = logits_of(Path(model), pictures)
    assert logits.shape == (21, 10)
    assert (logits.argmax(1) == labels).mean() > 0.8


def test_schedule_of_other_weights_is_refused_by_export(
    staircase: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load(staircase, Staircase)
    other = {"vit": {**json.loads(staircase.read_text())["vit"], "weights_sha256": "0" * 64}}
    rest = {"method": "topk", "policy": "search", "tokens": [found.vit.tokens] * found.vit.depth}
    (tmp_path / "schedule.json").write_text(json.dumps(other | rest))
    code, _, err = call(capsys, "export", "--schedule", tmp_path / "schedule.json", "--out", tmp_path / "m.onnx")
    assert code == 1 and "other weights" in err
    assert not (tmp_path / "m.onnx").exists()


def test_compare_json(shallow: Shallow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ("--images", few_digits(tmp_path / "digits", 36), "--work", shallow.work(tmp_path / "work"))
    common = ("--model", shallow.model, "--device", "orin-nano", "--simulate", "--search-images", "4", *places)
    rows = row_of(capsys, "compare", *common, "--methods", "topk,none", "--speedup", "1.15")["rows"]
    for row in rows:
        check_row(row | {"bundle": row["bundle"] or ""}, depth=3)
        assert row["simulated"] is True
        assert row["images"] == 36 - 4  # schedules are not judged on the pictures they were chosen on
        assert row["held_out"] is True
    assert {(row["method"], row["policy"]) for row in rows} >= {("topk", "search"), ("none", "search")}
    searched = next(row for row in rows if (row["method"], row["policy"]) == ("topk", "search"))
    assert searched["speedup"] >= 1.15 * 0.97


# --- measured here ---


def test_bench_measures_bundles_side_by_side(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shared.bundle, copy)
    first, second = row_of(capsys, "bench", shared.bundle, copy, "--rounds", "5")["rows"]
    assert (first["bundle"], second["bundle"]) == (str(shared.bundle), str(copy))
    assert first["speedup_to_first"] == 1
    for row in (first, second):
        assert set(row["latency_ms"]) == {"median", "p90", "p99", "low", "high"}
        assert 0 < row["latency_ms"]["low"] <= row["latency_ms"]["median"] <= row["latency_ms"]["high"]
        assert row["simulated"] is False
        assert row["tokens"] == shared.row["tokens"]
    low, high = second["speedup_interval"]
    assert low <= second["speedup_to_first"] <= high


def test_bench_refuses_a_bundle_given_twice(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "bench", shared.bundle, shared.bundle)
    assert code == 1 and "twice" in err


@pytest.fixture(scope="module")
def probes(shallow: Shallow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `export --trunk` writes for the shallow model and topk; all but the cuts is there already."""
    work = shallow.work(tmp_path_factory.mktemp("probes") / "work")
    [folder] = work.iterdir()
    for cut in folder.glob("cut-*"):
        cut.unlink()
    options = ("--model", shallow.model, "--method", "topk", "--out", folder)
    code, out, err = processes.command(work.parent, "export", "--trunk", *options, "--json")
    assert code == 0, err
    assert json.loads(out)["path"] == str(folder / "trunk.onnx")
    return folder


def test_profile_trunk_needs_no_torch(probes: Path, tmp_path: Path) -> None:
    out = tmp_path / "staircase.json"
    common = ("--trunk", probes / "trunk.onnx", "--method", "topk", "--work", tmp_path / "work", "--out", out)
    code, stdout, stderr = without_torch("profile", "--device", "cpu", *common, "--json")
    assert code == 0, stderr
    row = json.loads(stdout)
    assert (row["device"], row["runtime"], row["simulated"]) == ("cpu", "ort-cpu", False)
    assert row["points"][-1]["tokens"] == 197
    assert row["probes"] >= 10 * len(row["points"])
    staircase = load(out, Staircase)
    assert staircase.vit == load(probes / "vit.json", type(staircase.vit))
    assert len(staircase.cuts["topk"]) == 2
    assert staircase.dense.median_ms > 0 and staircase.fixed.median_ms > 0
    for tokens in (row["points"][0]["tokens"], 197):  # what was timed is the trunk at that count
        graph = onnx.load(str(probes / f"trunk-{tokens}.onnx"), load_external_data=False).graph
        shape = [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim]
        assert shape == [1, tokens, 64]


def test_the_plot_of_a_staircase_is_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("profile", "--simulate", "--device", "orin-nano", "--work", tmp_path / "work", "--out")
    assert call(capsys, *common, tmp_path / "a.svg")[0] == 2
    for name, plot in (("a.json", "a.svg"), ("b.fp16", "b.fp16.svg")):
        row_of(capsys, *common, tmp_path / name)
        assert load(tmp_path / name, Staircase).points and (tmp_path / plot).read_text().startswith("<svg")


def test_export_takes_a_method_for_the_trunk_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "export", "--dense", "--method", "tome", "--out", tmp_path / "m.onnx")
    assert code == 2 and "--method belongs to --trunk" in err and not (tmp_path / "m.onnx").exists()


def test_profile_of_other_weights_is_of_their_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--simulate", "--device", "orin-nano", "--work", tmp_path / "work", "--out", tmp_path / "s.json")
    model = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), tmp_path / "seven.safetensors")
    for weights, classes in ((tmp_path / "seven.safetensors", 7), (None, 1000)):
        given = ("--weights", weights) if weights else ()
        row_of(capsys, "profile", "--model", "test_vit", *given, *common)
        assert load(tmp_path / "s.json", Staircase).vit.classes == classes
    headless = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    save_file(headless, tmp_path / "headless.safetensors")
    given = ("--model", "test_vit", "--weights", tmp_path / "headless.safetensors", "--task", "embed")
    row_of(capsys, "profile", *given, *common)
    assert load(tmp_path / "s.json", Staircase).vit.classes == model.embed_dim


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch", "2"), "batch"),  # probes of batch 1 must not pass for a staircase of batch 2
        (("--method", "tome"), "has no cuts by tome: export it with --method tome"),  # nor cuts for free
    ],
)
def test_profile_trunk_of_other_models_is_refused(
    options: tuple[str, str], said: str, probes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--simulate", "--device", "orin-nano", "--work", tmp_path / "work", "--out", tmp_path / "s.json")
    code, _, err = call(capsys, "profile", "--trunk", probes / "trunk.onnx", *options, *common)
    assert code == 1 and said in err
    assert not (tmp_path / "s.json").exists()


def test_export_trunk_does_not_mix_models(
    shallow: Shallow, probes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of models with other weights is refused, or all of it is written again."""
    folder = tmp_path / "probes"
    shutil.copytree(probes, folder)
    record = json.loads((folder / "vit.json").read_text())
    (folder / "vit.json").write_text(json.dumps(record | {"weights_sha256": "0" * 64}))
    code, _, err = call(capsys, "export", "--trunk", "--model", shallow.model, "--out", folder)
    now = json.loads((folder / "vit.json").read_text())["weights_sha256"]
    assert (code == 1 and "error: " in err) or now == record["weights_sha256"]


@pytest.mark.parametrize("missing", ["trunk.onnx", "vit.json", "dense.onnx"])
def test_profile_trunk_names_a_missing_probe(
    missing: str, probes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in {"trunk.onnx", "fixed.onnx", "dense.onnx", "vit.json"} - {missing}:
        shutil.copy(probes / name, tmp_path)
    code, _, err = call(capsys, "profile", "--trunk", tmp_path / "trunk.onnx")
    assert code == 1 and missing in err and "export --trunk" in err


def test_device_half_runs_without_torch(shared: Shared, tmp_path: Path) -> None:
    code, stdout, stderr = without_torch("bench", shared.bundle, "--rounds", "5", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["rows"][0]["model"] == "vit_digits"
    options = ("--simulate", "--device", "orin-nano", "--out", tmp_path / "s.json", "--json")
    code, stdout, stderr = without_torch("profile", *options)
    assert code == 0, stderr
    assert json.loads(stdout)["simulated"] is True


def test_build_without_torch_says_what_to_install(tmp_path: Path) -> None:
    code, _, stderr = without_torch("build", "--work", tmp_path / "work", "--out", tmp_path / "out")
    assert code == 1
    assert len(stderr.splitlines()) == 1 and 'pip install ".[export]" in the checkout' in stderr
    assert not (tmp_path / "out").exists()


def test_embedded_record_is_that_of_the_weights(shared: Shared) -> None:
    """`profile --simulate` plans with the record, `build` with the weights: they must be of one model."""
    manifest = json.loads((shared.bundle / "manifest.json").read_text())
    assert manifest["vit"] == json.loads(zoo.RECORD.read_text())


def test_python_m_edgeprune_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"edgeprune {__version__}\n"
