"""The Python API: what a script sees of it, on the embedded model and on models made here."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from support.builds import Shallow, few_digits
from support.processes import search_less

import edgeprune
from edgeprune import zoo
from edgeprune.errors import InputError, ModelError, ScheduleError, WeightsError
from edgeprune.images import load_images, load_pixels, normalise
from edgeprune.pipeline.context import Context
from edgeprune.records import Schedule, Staircase

HEAVY = ("torch", "timm", "onnx", "onnxruntime", "numpy", "msgspec", "PIL", "typer")
SIMULATED: dict[str, Any] = {"device": "orin-nano", "simulate": True, "precision": "fp32", "batch": 32}


@pytest.fixture(scope="module", autouse=True)
def _short_search() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        search_less(patch.setattr)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One work folder for all tests: steps that are done stay done."""
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def staircase(work: Path) -> Staircase:
    return edgeprune.profile(device="orin-nano", simulate=True, precision="fp16", batch=32, work=work)


@pytest.fixture(scope="module")
def schedule(work: Path, staircase: Staircase) -> Schedule:
    goal = edgeprune.Goal(speedup=1.5)
    return edgeprune.schedule(staircase, goal=goal, search_images=16, work=work)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 60 digits."""
    return few_digits(tmp_path_factory.mktemp("few"), 60)


@pytest.fixture(scope="module")
def digits() -> Any:
    """The embedded model with its weights, as a timm module."""
    from edgeprune.vit.models import load_model

    return load_model(zoo.EMBEDDED).module


def test_import_is_light() -> None:
    """`import edgeprune` loads nothing but itself; the functions are there all the same."""
    code = (
        "import edgeprune, json, sys\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(json.dumps([loaded, sorted(n for n in sys.modules if n.startswith('edgeprune'))]))\n"
        "assert callable(edgeprune.build) and edgeprune.Goal(speedup=2).speedup == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, own = json.loads(done.stdout)
    assert loaded == [] and "edgeprune.api" not in own


def test_all_names_are_there() -> None:
    for name in edgeprune.__all__:
        assert getattr(edgeprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edgeprune.nothing


def test_packages_do_not_hide_the_functions() -> None:
    """The functions keep their names after every module has been imported."""
    import edgeprune.benchmark.bench
    import edgeprune.pipeline.build
    import edgeprune.pipeline.compare
    import edgeprune.pipeline.profile

    for name in ("build", "profile", "schedule", "prune", "compare", "bench"):
        assert callable(getattr(edgeprune, name)), name


def test_profile_schedule_prune(staircase: Staircase, schedule: Schedule, digits: Any) -> None:
    """A pruned module gives the logits that `build` exports: any batch, unchanged by batch-mates."""
    import torch

    from edgeprune.vit.fidelity import logits_of_schedule
    from edgeprune.vit.models import load_model

    assert staircase.setup.simulated and len(schedule.tokens) == staircase.vit.depth
    assert schedule.predicted_ms is not None and schedule.predicted_ms <= staircase.dense.median_ms / 1.5
    pruned = edgeprune.prune(digits, schedule)
    model = load_model(zoo.EMBEDDED)
    pixels = load_pixels(load_images(zoo.images_dir() / "labels.csv").paths[:5], model.preprocessing)
    images = torch.from_numpy(normalise(pixels, model.preprocessing))
    with torch.no_grad():
        together, alone = pruned(images), torch.cat([pruned(image[None]) for image in images])
    wanted = logits_of_schedule(model, schedule.method, schedule.tokens, pixels, schedule.prefix_last)
    np.testing.assert_allclose(together.numpy(), wanted, atol=1e-4)
    np.testing.assert_allclose(alone.numpy(), together.numpy(), atol=1e-4)
    assert next(pruned.parameters()) is next(digits.parameters())


def test_a_pruned_module_can_be_trained(tiny: Callable[..., Any]) -> None:
    """Gradients reach every parameter; dropout and stochastic depth act in training, not in evaluation."""
    import copy

    import torch

    model = tiny("cls")
    module = copy.deepcopy(model.module)
    for block in module.blocks:
        block.drop_path2 = torch.nn.Dropout(0.5)
        block.attn.attn_drop.p = 0.5
    vit = model.vit
    tokens = (vit.tokens, 9, 9)
    made = Schedule(vit=vit, method="fold", policy="search", tokens=tokens, prefix_last=True)
    pruned = edgeprune.prune(module, made)
    images = torch.randn(2, 3, 16, 16)
    assert not pruned.training and torch.equal(pruned(images), pruned(images))
    pruned.train()
    assert not torch.equal(pruned(images), pruned(images))
    pruned(images).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_a_schedule_of_another_model_is_refused(schedule: Schedule, tiny: Callable[..., Any]) -> None:
    import torch

    with pytest.raises(InputError, match=r"the schedule is for pictures of 28 px, the model takes 16"):
        edgeprune.prune(tiny("cls").module, schedule)
    small = msgspec.structs.replace(schedule, vit=msgspec.structs.replace(schedule.vit, image_px=16))
    with pytest.raises(InputError, match=r"was made for vit_digits, not for this VisionTransformer:"):
        edgeprune.prune(tiny("cls").module, small)
    with pytest.raises(ModelError, match="not a timm VisionTransformer"):
        edgeprune.prune(torch.nn.Linear(2, 2), schedule)


@pytest.mark.parametrize(
    "options",
    [{"goal": edgeprune.Goal(speedup=0)}, {"goal": edgeprune.Goal(speedup=2, alpha=0.5)}, {"rounds": 0},
     {"search_images": 0}, {"neighbours": -1}],
)  # fmt: skip
def test_options_out_of_range_are_refused_before_any_work(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out of range|2 goals|too few"):
        edgeprune.build(work=tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()


def test_an_impossible_goal(work: Path, staircase: Staircase) -> None:
    with pytest.raises(ScheduleError, match="relax"):
        edgeprune.schedule(staircase, goal=edgeprune.Goal(speedup=50), search_images=4, work=work)


def test_build_of_a_module(
    work: Path,
    shallow: Shallow,
    few: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A module is taken with the weights it has, and copied; a bundle answers for itself. Nothing is printed."""
    import torch

    from edgeprune.vit.models import load_model

    module = load_model(shallow.model).module.train()
    with torch.no_grad():
        module.head.bias[3] += 100.0  # every picture is a 3 now
    seen: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO, "edgeprune"):
        bundle = edgeprune.build(
            module, images=few, goal=edgeprune.Goal(speedup=1.5), search_images=8,
            neighbours=0, work=work, out=tmp_path / "bundle", progress=lambda *step: seen.append(step), **SIMULATED,
        )  # fmt: skip
    assert module.training and seen and any("step 1 of" in record.message for record in caplog.records)
    assert bundle.figures.speedup is not None and bundle.figures.speedup >= 1.5 * 0.98
    assert bundle.figures.agreement == 100.0 and bundle.figures.held_out is True
    assert len(bundle.schedule.tokens) == bundle.schedule.vit.depth == 3
    assert bundle.schedule.tokens[-1] < bundle.schedule.vit.tokens
    assert bundle.staircase is not None and bundle.staircase.setup == bundle.manifest.engine.setup
    again = edgeprune.Bundle.load(tmp_path / "bundle")
    assert again == bundle
    pictures = sorted((zoo.images_dir() / "images").iterdir())[:3]
    found = again.predict(pictures, top=2)
    assert found.latency is None and again.predict(pictures[0], timed=True).latency is not None
    assert [row.image for row in found.rows] == pictures
    assert {row.top[0].index for row in found.rows} == {3} and found.rows[0].top[0].percent > 99
    assert again.predict(str(pictures[0])).rows[0].top[0].index == 3
    assert {check.status for check in again.verify()} <= {"ok", "warning"}
    assert capsys.readouterr().out == ""


def test_int8_ranges_are_kept_in_a_work_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Path] = []
    places: tuple[dict[str, Any], ...] = ({}, {"work": tmp_path / "work"}, {"work": str(tmp_path)})

    def build(options: Any, progress: Any) -> Any:
        given.append(Context(options, None, None, None).calib)  # type: ignore[arg-type]
        return SimpleNamespace(path=options.work, manifest=None, precisions=())

    monkeypatch.setattr("edgeprune.pipeline.build.build", build)
    for place in places:
        edgeprune.build(**place)
    assert given == [Path("calib"), tmp_path / "work", tmp_path]


def test_the_staircase_has_what_was_asked_for(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Of a simulation the cost of cuts, too; a trunk has the outputs it was exported with."""
    made = edgeprune.profile(tiny("cls").module, method="topk", work=tmp_path / "work", **SIMULATED)
    assert made.cuts["topk"] and made.setup.simulated
    with pytest.raises(InputError, match=r"trunk\.onnx has its outputs already: pass --layers to edgeprune export"):
        edgeprune.profile(trunk=tmp_path / "trunk.onnx", layers=(1,), work=tmp_path / "work")


def test_a_module_takes_no_other_weights(digits: Any, work: Path) -> None:
    with pytest.raises(WeightsError, match="a module already has weights"):
        edgeprune.profile(digits, weights="pretrained", work=work)


def test_a_model_from_a_local_folder(tmp_path: Path, work: Path) -> None:
    """`local-dir:` as timm takes it: config.json and model.safetensors."""
    import timm
    from safetensors.torch import save_file

    from edgeprune.vit.models import load_model

    made = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    folder = tmp_path / "my-vit"
    folder.mkdir()
    save_file(made.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "config.json").write_text(json.dumps(config))
    found = load_model(f"local-dir:{folder}")
    assert found.vit.name == "my-vit" and found.vit.classes == 5 and found.preprocessing.mean == (0.1, 0.2, 0.3)
    for name, value in made.state_dict().items():
        assert (found.module.state_dict()[name] == value).all(), name


@pytest.mark.parametrize("name", ["local-dir:/no/such/folder", "hf-hub:org/name"])
def test_a_model_that_cannot_be_fetched_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    from edgeprune.vit.models import load_model

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no connection\nand a long story")

    if name.startswith("hf"):
        monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"could not be fetched \(.*\): pass a local checkpoint") as error:
        load_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_module_in_half_precision_is_taken_in_fp32(kind: str) -> None:
    import timm
    import torch

    from edgeprune.vit.fidelity import pruned_module
    from edgeprune.vit.models import class_labels, load_model

    module = timm.create_model("test_vit").to(getattr(torch, kind))
    module.head = torch.nn.Linear(64, 5).to(getattr(torch, kind))
    model = load_model(module)
    assert next(module.parameters()).dtype == getattr(torch, kind)
    assert class_labels(model, None) == ("0", "1", "2", "3", "4") and model.task == "classify"
    found = pruned_module(model, "fold", (model.vit.tokens, *[50] * 5))(torch.zeros(1, 3, *model.vit.size))
    assert found.dtype == torch.float32 and found.shape == (1, 5)


def test_compare_and_bench(work: Path, shallow: Shallow, few: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": shallow.model, "images": few, "search_images": 8, "work": work, **SIMULATED}
    found = edgeprune.compare(methods=["fold", "none"], speedups=[1.5], **options)
    assert {(e.method, e.policy) for e in found.entries} == {("fold", "search"), ("none", "search")}
    assert all(e.report is not None and e.report.held_out for e in found.entries)
    made = [
        edgeprune.build(
            method=method, goal=edgeprune.Goal(speedup=1.5) if method == "fold" else None,
            neighbours=0, out=tmp_path / method, **options,
        )
        for method in ("none", "fold")
    ]  # fmt: skip
    result = edgeprune.bench(made, rounds=5)
    assert [row.bundle for row in result.rows] == [str(bundle.path) for bundle in made]
    none, fold = (bundle.figures.speedup for bundle in made)  # none has prefix_last, too
    assert none is not None and fold is not None and fold >= 1.5 * 0.98
    assert result.rows[1].speedup.value == pytest.approx(fold / none, rel=1e-6)
