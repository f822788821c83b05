"""What a user meets when something is wrong: one line that says what to do, exit 1, nothing half-written."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest
from PIL import Image
from support import processes
from support.builds import Shallow, Shared, call, few_digits, start
from support.paths import ROOT

from edgeprune import errors, zoo
from edgeprune.cli import main
from edgeprune.devices import this_machine
from edgeprune.pipeline.context import Options

VIT_TINY = "vit_tiny_patch16_224"
STEP = ": done", ": reused ", " of 4: "  # parts of the log lines about steps


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, an empty hub cache, and a working directory of the test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """fails(*argv) runs a command that must exit with 1 and one line of error; the line."""

    def run(*argv: object) -> str:
        code, out, err = call(capsys, *argv)
        assert code == 1, out + err
        return one_error(err)

    return run


def one_error(err: str) -> str:
    """The error line of stderr, which otherwise holds only log lines about steps."""
    lines = [line for line in err.splitlines() if not any(mark in line for mark in STEP)]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert ":" in lines[0].removeprefix("error: "), "what is wrong: what to do"
    return lines[0]


def leftovers(*folders: Path) -> list[Path]:
    """Temporary files and folders below some folders."""
    return [path for folder in folders for path in folder.rglob("*") if path.suffix in (".tmp", ".old")]


# --- models and weights ---


def test_unknown_model_suggests_near_names(fails: Callable[..., str]) -> None:
    line = fails("build", "--model", "vit_tiny_patch16_225")
    assert "vit_tiny_patch16_225" in line and "did you mean" in line and VIT_TINY in line


def test_hopeless_name_says_where_names_are(fails: Callable[..., str]) -> None:
    assert "timm.list_models" in fails("build", "--model", "etc_passwd")
    assert "no such folder" in fails("build", "--model", "../../etc/passwd")


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_model_that_is_no_vit(weights: str, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]) -> None:
    """Told before its weights are fetched: no checkpoint would help."""
    import timm

    create = timm.create_model

    def without_hub(*args: Any, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise RuntimeError("fetching the weights")
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", without_hub)
    line = fails("build", "--model", "resnet18", "--weights", weights)
    assert "ResNet is not a timm VisionTransformer" in line and "timm.list_models" in line


def test_vit_with_unsupported_blocks(fails: Callable[..., str]) -> None:
    line = fails("build", "--model", "vit_small_patch16_18x2_224", "--weights", "random")
    assert "ParallelThingsBlock" in line


def test_pretrained_without_network_says_how_to_pass_a_file() -> None:
    """In a process of its own: the hub reads its environment when it is imported."""
    done = start("build", "--model", VIT_TINY, "--weights", "pretrained")
    assert done.returncode == 1
    line = one_error(done.stderr)
    assert "could not be fetched" in line and "--weights FILE.safetensors" in line


def test_missing_weights(fails: Callable[..., str]) -> None:
    assert "nowhere.safetensors: no such file" in fails("build", "--weights", "nowhere.safetensors")


def test_truncated_weights(tmp_path: Path, fails: Callable[..., str]) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(zoo.WEIGHTS.read_bytes()[:-1000])
    line = fails("build", "--weights", path)
    assert str(path) in line and "safetensors" in line


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_not_run(protocol: int, tmp_path: Path, fails: Callable[..., str]) -> None:
    import torch

    marker, path = tmp_path / "executed", tmp_path / "weights.pth"
    state = {"state_dict": {"head.weight": torch.zeros(10, 64), "bomb": Bomb(marker)}}
    torch.save(state, path, pickle_protocol=protocol)
    line = fails("build", "--weights", path)
    assert str(path) in line and ".safetensors" in line
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Bomb(marker), protocol))
    fails("build", "--weights", plain)
    assert not marker.exists()
    pickle.loads(plain.read_bytes())  # the bomb is a real one
    assert marker.exists()


def test_weights_of_another_model(tmp_path: Path, fails: Callable[..., str]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(zoo.WEIGHTS)
    state["blocks.12.attn.qkv.weight"] = state.pop("blocks.11.attn.qkv.weight")
    save_file(state, tmp_path / "keys.safetensors")
    line = fails("build", "--weights", tmp_path / "keys.safetensors")
    assert "blocks.11.attn.qkv.weight" in line and "blocks.12.attn.qkv.weight" in line
    state = load_file(zoo.WEIGHTS) | {"cls_token": torch.zeros(1, 1, 32)}
    save_file(state, tmp_path / "shape.safetensors")
    line = fails("build", "--weights", tmp_path / "shape.safetensors")
    assert "cls_token" in line and "(1, 1, 32)" in line and "(1, 1, 64)" in line


def test_embedded_weights_are_of_the_embedded_model(fails: Callable[..., str]) -> None:
    assert "--weights FILE" in fails("build", "--model", VIT_TINY, "--weights", "embedded")


# --- pictures ---


def test_missing_images(fails: Callable[..., str]) -> None:
    assert "nowhere: no such folder or CSV" in fails("build", "--images", "nowhere")


def test_empty_folder_of_images(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "no pictures" in fails("build", "--images", tmp_path / "here")


def test_csv_with_a_missing_image(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "labels.csv").write_text("image,label\ngone.png,1\n")
    line = fails("build", "--images", tmp_path / "labels.csv")
    assert "labels.csv:2" in line and "gone.png" in line


def test_csv_with_an_endless_name(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "labels.csv").write_text(f"image\n{'a' * 5000}.png\n")
    assert "labels.csv" in fails("build", "--images", tmp_path / "labels.csv")


def test_csv_that_leads_out_of_its_folder(tmp_path: Path, fails: Callable[..., str]) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "labels.csv").write_text("image\n../secret.png\n")
    assert "is outside set/" in fails("build", "--images", tmp_path / "set" / "labels.csv")


def test_unreadable_image(shallow: Shallow, tmp_path: Path, fails: Callable[..., str]) -> None:
    source = few_digits(tmp_path / "digits", 3)
    broken = sorted((tmp_path / "digits" / "images").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:40])
    work = shallow.work(tmp_path / "work")
    options = ("--simulate", "--device", "orin-nano", "--method", "none", "--work", work, "--model", shallow.model)
    line = fails("build", "--images", source, *options, "--out", tmp_path / "bundle")
    assert str(broken) in line and "remove or replace it" in line
    assert not (tmp_path / "bundle").exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("label", "complaint"), [("10", "classes 0 to 9"), ("-1", "class index"), ("two", "class index")]
)
def test_label_out_of_range(label: str, complaint: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    source = few_digits(tmp_path / "digits", 3)
    lines = source.read_text().splitlines()
    lines[-1] = lines[-1].rpartition(",")[0] + f",{label}"
    source.write_text("\n".join(lines))
    line = fails("build", "--images", source)
    assert complaint in line and label in line


# --- places ---


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills when a build goes beyond its checks, which then ends."""
    from edgeprune.pipeline import build

    seen: list[str] = []

    def staircase(*_: object, **__: object) -> None:
        seen.append("staircase")
        raise RuntimeError("the build has started to measure")

    monkeypatch.setattr(build, "measured_staircase", staircase)
    return seen


def test_out_below_a_file_is_told_before_the_work(
    tmp_path: Path, started: list[str], fails: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("kept")
    line = fails("build", "--out", tmp_path / "file" / "bundle")
    assert "cannot be written" in line and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "kept"
    assert not started


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--out", "."), ". is the current folder, which cannot be replaced: choose another --out"),
        (("--out", "o", "--work", "o/work"), "o is the bundle's folder and holds the work folder o/work: choose"),
    ],
)
def test_out_that_cannot_be_replaced(
    options: tuple[str, ...], said: str, started: list[str], fails: Callable[..., str]
) -> None:
    """A folder around the work folder would be replaced with all that is in it."""
    assert said in fails("build", *options)
    assert not started


@pytest.mark.parametrize("place", ["folder", "file"])
def test_out_that_is_no_bundle_is_left_alone(
    place: str, tmp_path: Path, started: list[str], fails: Callable[..., str]
) -> None:
    """Told before the work, too: nobody should wait for a build that cannot be kept."""
    if place == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
        kept = tmp_path / "out" / "thesis.tex"
    else:
        kept = tmp_path / "out"
        kept.write_text("irreplaceable")
    line = fails("build", "--out", tmp_path / "out")
    assert "not a bundle" in line and "choose another --out" in line
    assert kept.read_text() == "irreplaceable"
    assert not started


def test_work_below_a_file(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("kept")
    options = ("--simulate", "--device", "orin-nano", "--method", "none", "--out", tmp_path / "bundle")
    line = fails("build", "--work", tmp_path / "file" / "work", *options)
    assert "cannot be written" in line and str(tmp_path / "file") in line
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("command", ["bench nowhere --out", "bench nowhere --summary", "profile --simulate --out"])
def test_a_result_that_cannot_be_written_is_told_before_the_work(
    command: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(*command.split(), tmp_path / "file" / "x.json")


def test_a_pipe_is_not_replaced_by_a_file(shared: Shared, tmp_path: Path, fails: Callable[..., str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in fails("report", shared.bundle, "--out", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_bundle_is_not_replaced_by_itself_compiled(shared: Shared, fails: Callable[..., str]) -> None:
    before = sorted(path.name for path in shared.bundle.iterdir())
    line = fails("compile", shared.bundle / "model.onnx", "--out", shared.bundle)
    assert "would be replaced: choose another --out" in line
    assert sorted(path.name for path in shared.bundle.iterdir()) == before


def test_no_target_that_can_be_reached(shallow: Shallow, tmp_path: Path, fails: Callable[..., str]) -> None:
    options = ("--device", "orin-nano", "--simulate", "--search-images", "4", "--speedup", "50")
    images = few_digits(tmp_path / "digits", 36)
    work = shallow.work(tmp_path / "work")
    given = ("--model", shallow.model, "--methods", "topk", "--images", images, "--work", work)
    assert "topk" in fails("compare", *given, *options)


def test_onnx_without_an_input(tmp_path: Path, fails: Callable[..., str]) -> None:
    node = onnx.helper.make_node("Constant", [], ["y"], value_float=1.0)
    graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_empty_tensor_value_info("y")])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    assert "has no input: export it with edgeprune export" in fails("compile", tmp_path / "model.onnx")


def test_staircase_to_a_folder(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "folder").mkdir()
    line = fails("profile", "--simulate", "--device", "orin-nano", "--out", tmp_path / "folder")
    assert "cannot be written" in line
    assert not leftovers(tmp_path)


# --- devices and options ---


def test_unknown_device(fails: Callable[..., str]) -> None:
    line = fails("build", "--device", "orin")
    assert "'orin'" in line and "orin-nano" in line and ".toml" in line


@pytest.mark.skipif("Orin Nano" in this_machine(), reason="this is an Orin Nano")
@pytest.mark.parametrize("command", ["build", "profile"])
def test_device_that_is_not_here_names_this_machine(command: str, fails: Callable[..., str]) -> None:
    line = fails(command, "--device", "orin-nano")
    assert "orin-nano is not this machine" in line
    assert " ".join(this_machine().split()) in line
    assert "--simulate" in line


def test_device_too_old_to_build_for(fails: Callable[..., str]) -> None:
    line = fails("build", "--device", "jetson-tx2")
    assert "8.6" in line and "--simulate" in line


def test_device_without_a_simulation(fails: Callable[..., str]) -> None:
    assert "orin-nano" in fails("profile", "--device", "cpu", "--simulate")


@pytest.mark.parametrize("command", ["build", "profile", "profile --simulate", "export --trunk"])
def test_unknown_method(
    command: str, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    from edgeprune.vit import export

    def exported(*_: object, **__: object) -> None:
        started.append("export")
        raise RuntimeError("the export has started")

    monkeypatch.setattr(export, "_exported", exported)
    device = ("--device", "orin-nano") if "--simulate" in command else ()
    line = fails(*command.split(), *device, "--method", "sculpt")
    assert "'sculpt'" in line and "pomt" in line and "topk" in line
    assert not started


@pytest.mark.parametrize("command", ["build", "schedule"])
def test_unknown_policy(command: str, shared: Shared, tmp_path: Path, fails: Callable[..., str]) -> None:
    staircase = (shared.bundle / "staircase.json",) if command == "schedule" else ()
    pictures = ("--images", few_digits(tmp_path / "digits", 3), "--work", shared.work, "--method", "pomt")
    line = fails(command, *staircase, "--policy", "monetary", *pictures)
    assert "'monetary'" in line and "search" in line and "paper" in line


def test_unknown_precision(fails: Callable[..., str]) -> None:
    line = fails("build", "--precision", "int4")
    assert "'int4'" in line and "fp16" in line


def test_batch_of_none(fails: Callable[..., str]) -> None:
    assert "batch 0" in fails("build", "--batch", "0")
    assert "batch -1" in fails("export", "--dense", "--batch", "-1")


@pytest.mark.parametrize(
    ("option", "what"),
    [
        (("--mean", "0,0"), "mean (0.0, 0.0): pass three numbers"),
        (("--mean", "0,0,x"), "--mean '0,0,x': pass three numbers as r,g,b"),
        (("--mean", "nan,0,0"), "mean (nan, 0.0, 0.0): pass three numbers"),
        (("--std", "1,0,1"), "red, green and blue, above 0"),
        (("--interpolation", "guess"), "interpolation 'guess'"),
    ],
)
def test_impossible_preprocessing(
    option: tuple[str, str], what: str, started: list[str], fails: Callable[..., str]
) -> None:
    assert what in fails("build", *option)
    assert not started


def test_impossible_budget_says_what_is_possible(shared: Shared, tmp_path: Path, fails: Callable[..., str]) -> None:
    options = ("--method", "pomt", "--images", few_digits(tmp_path / "digits", 3), "--search-images", "2")
    line = fails("build", *options, "--budget-ms", "0.001", "--work", shared.work, "--out", tmp_path / "bundle")
    assert "0.001 ms cannot be met" in line and "at best" in line and "relax" in line
    assert not (tmp_path / "bundle").exists()


def test_block_that_does_not_exist(shared: Shared, tmp_path: Path, fails: Callable[..., str]) -> None:
    options = ("--method", "pomt", "--images", few_digits(tmp_path / "digits", 3), "--work", shared.work)
    line = fails("build", *options, "--policy", "paper", "--block", "99", "--out", tmp_path / "bundle")
    assert "block 99" in line and "0 to 1" in line


# --- files of edgeprune's own ---


@pytest.mark.parametrize("name", ["model.onnx", "golden_input.npy", "staircase.json"])
def test_changed_byte_in_a_bundle(name: str, shared: Shared, tmp_path: Path, fails: Callable[..., str]) -> None:
    shutil.copytree(shared.bundle, tmp_path / "bundle")
    data = bytearray((tmp_path / "bundle" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bundle" / name).write_bytes(data)
    line = fails("bench", tmp_path / "bundle")
    assert name in line and "sha256" in line and "again" in line


def test_damaged_bundle_is_built_again(shared: Shared, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(shared.bundle, out)
    (out / "model.onnx").write_bytes(b"damaged")
    command = [str(out) if part == str(shared.bundle) else part for part in shared.command]
    code, _, err = call(capsys, *command)
    assert code == 0, err
    assert (out / "model.onnx").read_bytes() == (shared.bundle / "model.onnx").read_bytes()


def test_no_bundle_to_bench(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "edgeprune build" in fails("bench", tmp_path / "here")


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b'{"schema": 1}', b"\xff\xfe", b'{"vit": 3}'])
def test_staircase_that_is_none(content: bytes, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "staircase.json").write_bytes(content)
    assert "not a valid staircase" in fails("schedule", tmp_path / "staircase.json")


# --- what no code expects ---


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "x.png"), "x.png: Permission denied: check the path and its perm"),
        (OSError(28, "No space left on device"), "error: No space left on device: free some space"),
        (BrokenPipeError(32, "Broken pipe"), None),
        (ConnectionResetError(104, "Connection reset by peer"), None),
        (OSError("of another kind"), None),
    ],
)
def test_an_error_of_a_file_is_one_line(
    error: OSError, line: str | None, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises() -> None:
        raise error

    monkeypatch.setattr(import_module("edgeprune.cli.app"), "app", raises)
    if line is not None:
        assert line in fails("devices")
    else:
        with pytest.raises(type(error)):
            fails("devices")


def test_names_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(import_module("edgeprune.cli.app"), "app", lambda: print("caf\udce9 →", flush=True))
    main()
    assert out.buffer.getvalue() == b"caf? ?\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("schedule staircase.json", "pipeline.schedule.schedule_from_file"),
        ("compare", "pipeline.compare.compare"),
        ("export --dense", "vit.models.load_model"),
    ],
)
def test_preprocessing_reaches_every_command(
    command: str, function: str, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(*given: Any, **_: Any) -> None:
        found = next(each for each in given if isinstance(each, Options | dict))
        raise errors.InputError(f"seen: {found.overrides if isinstance(found, Options) else found}")

    monkeypatch.setattr(f"edgeprune.{function}", seen)
    line = fails(*command.split(), "--crop-pct", "0.9", "--mean", "0.1,0.2,0.3")
    assert str({"crop_pct": 0.9, "mean": (0.1, 0.2, 0.3)}) in line


# --- Ctrl-C ---


def test_interrupted_build_leaves_nothing_and_goes_on(
    shallow: Shallow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the staircase, with the profiling models already exported."""
    work, out = shallow.work(tmp_path / "work"), tmp_path / "bundle"
    what = ("--model", shallow.model, "--images", few_digits(tmp_path / "digits"), "--method", "none")
    command = ("build", "--device", "orin-nano", "--simulate", *what, "--work", work, "--out", out)
    code, stdout, stderr = processes.command(tmp_path, *command, interrupt_after=2)
    assert code == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "run the same command again to continue" in stderr
    assert not out.exists()
    assert not leftovers(tmp_path)
    assert list(work.glob("samples-*.json"))
    code, _, stderr = call(capsys, *command)
    assert code == 0, stderr
    assert "staircase: resuming" in stderr
    assert (out / "manifest.json").is_file()
    assert not leftovers(tmp_path)
    assert not list(work.glob("samples-*.json"))
    golden = np.load(out / "golden_output.npy")
    assert golden.shape == (1, 10)


def test_what_is_to_be_reported_says_where() -> None:
    """At the place that the package's metadata names; no message asks for a report in words of its own."""
    [place] = re.findall(r"https://\S+", errors.REPORT)
    assert f'Issues = "{place}"' in (ROOT / "pyproject.toml").read_text()
    sources = {path.name: path.read_text() for path in Path(errors.__file__).parent.rglob("*.py")}
    assert [name for name, text in sources.items() if re.search(r"report (this|it\b)", text)] == ["errors.py"]
    assert sum("{REPORT}" in text for text in sources.values()) >= 6


def test_error_is_one_line_in_a_process_too(tmp_path: Path) -> None:
    """Where no test framework catches the warnings of torch; those of its import are above, without a network."""
    import torch

    torch.save({"bomb": Bomb(tmp_path / "executed")}, tmp_path / "weights.pth", pickle_protocol=4)
    code, out, err = processes.command(tmp_path, "build", "--weights", tmp_path / "weights.pth")
    assert code == 1
    assert out == ""
    assert "weights.pth" in one_error(err)
    assert not list((tmp_path / "here").iterdir())
    assert not (tmp_path / "executed").exists()
