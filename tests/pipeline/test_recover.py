"""`--recover` from the command line to the bundle: figures, interruptions, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.builds import QUICK, Shallow, call, few_digits, row_of, without_torch
from support.evaluation import labelled, logits_of
from support.loopback import check_ships
from support.models import shake

import edgeprune
from edgeprune.bundles.format import load_bundle
from edgeprune.errors import InputError
from edgeprune.images import drawn, load_images
from edgeprune.pipeline.context import Options, context_for, recovery_set
from edgeprune.pipeline.recovery import recover, recover_best
from edgeprune.records import Manifest, Schedule
from edgeprune.vit import recovery

SIMULATED = ("--simulate", "--device", "orin-nano", "--method", "topk")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of 17 tokens for 28 px digits, for --model: its staircase has few counts to probe."""
    import timm
    from safetensors.torch import save_file

    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 3}
    name, folder = "vit_tiny_patch16_224", tmp_path_factory.mktemp("small")
    module = shake(timm.create_model(name, num_classes=10, **shape))
    save_file(module.state_dict(), folder / "model.safetensors")
    how = {"input_size": [3, 28, 28], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    config = {"architecture": name, "num_classes": 10, "model_args": shape, "pretrained_cfg": how}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One work folder for all builds here, so that the unpruned model is exported once."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs, at a rate for few pictures."""
    monkeypatch.setattr(recovery, "Recipe", partial(recovery.Recipe, epochs=2, least_steps=0, rate=4e-4, batch=8))


def test_a_build_recovers_and_can_be_interrupted(
    small: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second epoch, then the same command again: half of the pictures are tuned on, the others judge.

    The bundle verifies and runs, and the record goes with it to a compilation elsewhere.
    """
    digits, bundle = few_digits(tmp_path / "digits", 80), tmp_path / "bundle"
    command = (
        "build", *SIMULATED, "--policy", "paper", "--block", "1", "--batch", "32", *QUICK, "--model", small,
        "--images", digits, "--work", work, "--out", bundle, "--recover",
    )  # fmt: skip
    judge, epochs = recovery._Run.judge, []

    def interrupted(run: recovery._Run) -> None:
        epochs.append(run.state.epoch)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        judge(run)

    monkeypatch.setattr(recovery._Run, "judge", interrupted)
    code, _, err = call(capsys, *command, "--json")
    assert code == 130 and "run the same command again to continue" in err and not bundle.exists()
    row = row_of(capsys, *command)
    assert epochs == [0, 1, 1] and not list(work.glob("*.checkpoint"))

    record, before = row["recovery"], row["unrecovered"]
    assert (record["images"], record["validation_images"], row["images"]) == (40, 10, 40) and row["held_out"]
    assert record["epochs"] and record["kl_after"] < record["kl_before"] == record["curve"][0]
    assert row["kl"] < before["kl"] and 0 < before["kl_error"] < before["kl"]
    others = np.random.default_rng(0).permutation(80)[40:]
    pictures, labels = labelled(digits)
    answers = logits_of(bundle / "model.onnx", pictures)[others].argmax(1)
    assert row["top1"] == pytest.approx(100 * (answers == labels[others]).mean())

    code, out, err = call(capsys, "verify", bundle, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1]), err
    assert row_of(capsys, "run", bundle, tmp_path / "digits" / "images")["rows"]
    assert "without recovery" in (bundle / "report.html").read_text()
    there = row_of(capsys, "compile", bundle / "model.onnx", "--work", tmp_path / "w", "--out", tmp_path / "there")
    manifest = load_bundle(tmp_path / "there")
    assert there["recovery"] == record and there["unrecovered"] is None and manifest.recovery is not None
    check_ships(tmp_path / "there", tmp_path)

    old = json.loads((bundle / "manifest.json").read_text())  # of a version that knew no recovery
    del old["recovery"], old["report"]["unrecovered"]
    assert msgspec.json.decode(json.dumps(old), type=Manifest).recovery is None


def test_the_schedule_that_recovers_best_is_kept(
    small: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three schedules: after an eighth one is left, by the held-out loss; killed in between, it ends the same."""
    digits = few_digits(tmp_path / "digits", 48)
    options = Options(
        device="orin-nano", simulate=True, model=small, images=digits, method="topk", work=work, recover=True
    )
    context = context_for(options)
    vit, depth = context.model.vit, context.model.vit.depth
    given = [
        Schedule(vit=vit, method="topk", policy="search", tokens=(17,) + (n,) * (depth - 1), predicted_ms=1.0)
        for n in (5, 12, 7)
    ]
    monkeypatch.setattr(recovery, "Recipe", partial(recovery.Recipe, epochs=16, least_steps=0, rate=4e-4, batch=8))
    judge, judged = recovery._Run.judge, []

    def dying(run: recovery._Run) -> None:
        judged.append((run.student.tokens[-1], run.state.epoch + 1))
        if len(judged) == 4:
            raise KeyboardInterrupt
        judge(run)

    monkeypatch.setattr(recovery._Run, "judge", dying)
    with pytest.raises(KeyboardInterrupt):
        recover_best(context, given, lambda schedule: ())
    with caplog.at_level("INFO"):
        chosen, found = recover_best(context, given, lambda schedule: ())
    assert judged[:5] == [(5, 1), (5, 2), (12, 1), (12, 2), (12, 2)], "two of 16 epochs each; nothing is done twice"
    assert chosen.tokens[-1] == 12 and found is not None, "the most tokens"
    assert [epoch for tokens, epoch in judged[7:]] == [*range(3, 3 + len(judged[7:]))], "the best one continues"
    assert "schedule 3 of 3, with 7 tokens at the end: KL" in caplog.text
    assert recover(context, chosen).record == found.record and not list(work.glob("*.checkpoint"))  # type: ignore[union-attr]


def test_compare_recovers_on_pictures_from_anywhere(
    small: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures that weights are tuned on give no figures; they are recognised by content."""
    monkeypatch.setattr("edgeprune.pipeline.compare.SESSIONS", 1)
    digits = few_digits(tmp_path / "digits", 80)
    pictures = sorted((tmp_path / "digits" / "images").iterdir())
    (tmp_path / "elsewhere").mkdir()
    copies = [shutil.copy(path, tmp_path / "elsewhere" / f"copy-{path.name}") for path in pictures[:30]]
    some = tmp_path / "some" / "some.csv"
    some.parent.mkdir()
    some.write_text("\n".join(["image,label", *(f"{path},0" for path in [*copies, pictures[30]])]) + "\n")
    rows = row_of(
        capsys, "compare", "--simulate", "--device", "orin-nano", "--model", small, "--images", digits,
        "--methods", "topk,none", "--speedup", "1.1", "--batch", "32", "--search-images", "4", "--work", work,
        "--recover", some,
    )["rows"]  # fmt: skip
    with open(digits, newline="") as file:
        names = [Path(line["image"]).name for line in csv.DictReader(file)]
    searched = {names[i] for i in np.random.default_rng(0).permutation(80)[:4]}
    left = 80 - len(searched | {path.name for path in pictures[:31]})
    assert {(row["images"], row["held_out"]) for row in rows} == {(left, True)}
    tuned = [row for row in rows if row["recovery"]]
    assert tuned and all(row["method"] == "topk" and row["recovery"]["images"] == 31 for row in tuned)
    assert all(row["unrecovered"]["kl"] != row["kl"] for row in tuned if row["recovery"]["epochs"])
    assert all(row["unrecovered"] is None for row in rows if row not in tuned)


def test_labels_are_not_even_read(tmp_path: Path) -> None:
    images = load_images(few_digits(tmp_path / "digits", 40))
    assert images.labels is not None
    found = [recovery_set(Options(recover=recover), images) for recover in (True, tmp_path / "digits" / "labels.csv")]
    assert [set_.labels for set_ in found if set_] == [None, None]
    assert [len(set_) for set_ in found if set_] == [20, 40]
    searched = drawn(40, 15)
    assert found[0] is not None and {images.paths[i] for i in searched} <= set(found[0].paths)


def test_a_module_is_recovered_in_pytorch(small: str, tmp_path: Path) -> None:
    """edgeprune.recover leaves the module as it was and returns one that takes any batch."""
    import timm
    import torch

    from edgeprune.vit.models import load_model, weights_sha256

    module = timm.create_model(small, pretrained=True).eval()
    vit = load_model(module).vit
    schedule = Schedule(vit=vit, method="topk", policy="search", tokens=(12, 8, 5))
    before = weights_sha256(module)
    found = edgeprune.recover(module, schedule, images=few_digits(tmp_path / "digits", 24))
    assert weights_sha256(module) == before != weights_sha256(found.model)  # type: ignore[arg-type]
    assert found(torch.zeros(3, 3, 28, 28)).shape == (3, 10)
    with pytest.raises(InputError, match="at least 16 pictures, not 5"):
        edgeprune.recover(module, schedule, images=few_digits(tmp_path / "few", 5), task="embed")
    with pytest.raises(InputError, match="task dense does not fit the outputs of this schedule"):
        edgeprune.recover(module, schedule, images=tmp_path, task="dense")
    with pytest.raises(InputError, match="unknown task 'detect'"):
        edgeprune.recover(module, schedule, images=tmp_path, task="detect")


def test_a_schedule_without_cuts_is_not_recovered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The build goes on; all has been measured by then."""
    options = Options(images=few_digits(tmp_path / "digits", 40), recover=True, work=tmp_path / "work")
    context = context_for(options)
    schedule = Schedule(vit=context.model.vit, method="fold", policy="search", tokens=context.dense_tokens)
    assert recover(context, schedule) is None
    assert "removes no tokens, so nothing is recovered" in caplog.text


def test_what_cannot_be_recovered_is_refused_in_one_line(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, work = few_digits(tmp_path / "few", 20), ("--work", tmp_path / "work", "--out", tmp_path / "bundle")
    cases = {
        "at least 16 pictures, not 10": ("--images", few, "--recover"),
        "nowhere: no such folder or CSV: pass --recover DIR": ("--recover", "nowhere"),
        "--method none removes no tokens": ("--recover", "--method", "none"),
        "pass --images DIR|CSV or --recover DIR|CSV": ("--model", small, "--recover"),
    }
    for message, options in cases.items():
        code, out, err = call(capsys, "build", "--simulate", "--device", "orin-nano", *options, *work)
        assert code == 1 and out == "" and message in err.splitlines()[-1], err
        assert not (tmp_path / "bundle").exists()
    code, _, err = without_torch("build", "--device", "cpu", "--recover", *work)
    assert code == 1 and "needs torch" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((), False),
        (("--recover",), True),
        (("--recover", "--json"), True),
        (("--recover", "folder"), Path("folder")),
        (("--recover=folder", "--json"), Path("folder")),
    ],
)
def test_the_value_of_the_option_may_be_left_out(
    given: tuple[str, ...], wanted: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def stopped(options: Options, *_: object) -> None:
        seen.append(options.recover)
        raise InputError("stop")

    monkeypatch.setattr("edgeprune.pipeline.build.build", stopped)
    monkeypatch.setattr("edgeprune.pipeline.compare.compare", stopped)
    for command in ("build", "compare"):
        assert call(capsys, command, *given)[0] == 1
    assert seen == [wanted, wanted]


def test_a_build_for_a_speedup_chooses_the_schedule_that_recovers_best(
    shallow: Shallow,
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three blocks of the embedded model, as a newcomer would build it, but few pictures and simulated latencies."""
    monkeypatch.setattr("edgeprune.pipeline.refine.RIVALS", 3)
    digits, bundle = few_digits(tmp_path / "digits", 40), tmp_path / "bundle"
    with caplog.at_level("INFO"):
        row = row_of(
            capsys, "build", *SIMULATED, "--batch", "32", "--speedup", "1.5", "--search-images", "4",
            "--images", digits, "--model", shallow.model, "--work", work, "--out", bundle, "--recover",
        )  # fmt: skip
    assert "recovery: schedule 2 of " in caplog.text
    manifest = load_bundle(bundle)
    assert manifest.recovery is not None and row["speedup"] > 1.4
    trials = {tuple(trial["tokens"]) for trial in json.loads((bundle / "story.json").read_text())["trials"]}
    assert tuple(row["tokens"]) in trials, "it was measured before"
    assert call(capsys, "verify", bundle)[0] == 0
