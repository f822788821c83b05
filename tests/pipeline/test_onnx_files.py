"""The ONNX files of a build: INT8 ranges from a choice of all pictures, and a whole build in INT8."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.builds import call, few_digits
from support.computed import context_of

from edgeprune.errors import ExportError, InputError, PrecisionError
from edgeprune.images import load_images
from edgeprune.onnx_graph.graph import onnx_precision_of
from edgeprune.pipeline import export, onnx_files
from edgeprune.pipeline.build import build
from edgeprune.pipeline.compare import compare
from edgeprune.pipeline.compile import Inputs, check_for_tensorrt
from edgeprune.pipeline.context import Options
from edgeprune.pipeline.pictures import Pictures
from edgeprune.records import Int8Ranges, Schedule
from edgeprune.runtimes.target import target_for


def test_build_and_export_calibrate_on_the_same_pictures(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """650 pictures in five class folders, each of its own colour, by which it is known again."""
    for index in range(650):
        path = tmp_path / "pictures" / f"class-{index // 130}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index % 256, index // 256, 0)).save(path)
    model, files = tiny("cls"), load_images(tmp_path / "pictures")
    seen: list[NDArray[np.float32]] = []

    def calibrated(graph: onnx.ModelProto, batches: Any, task: Any, progress: Any) -> Int8Ranges:
        seen.append(np.concatenate(list(batches)))
        return Int8Ranges(way="entropy", ranges={}, kept=(), kl=0.0)

    for module in (onnx_files, export):
        monkeypatch.setattr(module, "calibrated", calibrated)
    monkeypatch.setitem(export.QUANTISED, "int8", lambda graph, ranges, kept: graph)
    export.export_model(model, None, 3, tmp_path / "exported.onnx", "int8", files)
    context = context_of(model.vit, tmp_path / "work", batch=3, calib=tmp_path / "calib")
    pictures = Pictures(files, model.preprocessing, context.target, 128)
    context = replace(context, model=model, pictures=pictures)
    for _ in range(2):
        onnx_files.int8_ranges(context, tmp_path / "exported.onnx")
    exported, built = seen
    np.testing.assert_array_equal(built, exported)
    red, green = (np.rint((built[:, channel, 0, 0] + 1) * 127.5).astype(int) for channel in (0, 1))
    chosen = {*(red + 256 * green).tolist()}
    assert len(chosen) == 32 and {index // 130 for index in chosen} == set(range(5))


def test_recovery_is_of_the_layers_in_int8(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the pruned model, with the calibration's ranges; in fp32 there are none."""
    from edgeprune.pipeline.recovery import recover
    from edgeprune.vit import recovery

    model, files = tiny("cls"), load_images(few_digits(tmp_path / "digits", 20))
    found = Int8Ranges(way="entropy", ranges=defaultdict(lambda: 4.0), kept=(), kl=0.0)
    monkeypatch.setattr(onnx_files, "int8_ranges", lambda *_: found)
    monkeypatch.setattr(recovery, "Recipe", partial(recovery.Recipe, epochs=1, least_steps=0))
    context = context_of(model.vit, tmp_path / "work", precision="int8")
    pictures = Pictures(files, model.preprocessing, context.target, 0)
    context = replace(context, model=model, recovery=pictures)
    schedule = Schedule(vit=model.vit, method="topk", policy="search", tokens=(9, 5, 5))
    layers = onnx_files.layers_in_int8(context, schedule)
    assert len(layers) == 12 and {layer.limit for layer in layers} == {4.0}
    assert recover(context, schedule, layers).record.fake_int8
    exact = replace(context, options=replace(context.options, precision="fp32"))
    assert onnx_files.layers_in_int8(exact, schedule) == ()
    assert not recover(exact, schedule).record.fake_int8


def test_build_in_int8(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of a tiny random model; the gate is recorded but not obeyed: INT8 need not be faster here."""
    from edgeprune.bundles.format import load_bundle

    compared: list[tuple[str, str]] = []

    def gate(names: tuple[str, str], *_: object) -> str | None:
        compared.append(names)
        return refusal

    refusal: str | None = "it loses all"

    monkeypatch.setattr("edgeprune.pipeline.evaluate.gate", gate)
    monkeypatch.setattr("edgeprune.images.CALIBRATION_IMAGES", 4)
    monkeypatch.setattr("edgeprune.latency.profiling.ROUNDS", 1)
    few_digits(tmp_path / "digits", 45)
    options = Options(
        model=tiny("cls").module, images=tmp_path / "digits" / "images", search_images=4, precision="int8",
        method="topk", policy="paper", block=1, rounds=5, neighbours=0,
        work=tmp_path / "work", out=tmp_path / "bundle", calib=tmp_path / "calib",
    )  # fmt: skip
    with pytest.raises(PrecisionError, match="int8 is refused because it loses all: build with --precision fp32"):
        build(options)
    refusal = None
    built = build(options)
    manifest = load_bundle(built.path)
    assert manifest.engine.setup.precision == "int8" and {*compared} == {("int8", "fp32")}
    operators = {node.op_type for node in onnx.load(built.path / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert list((tmp_path / "calib").glob("int8-*.json"))
    report = manifest.report
    assert report.dense_latency is not None and report.agreement is not None and report.top1 is None
    assert report.held_out and 45 - 8 <= report.images < 45
    trunk = next((tmp_path / "work").glob("profiling-models-*")) / "trunk.onnx"
    assert "QuantizeLinear" in {n.op_type for n in onnx.load(trunk, load_external_data=False).graph.node}


def test_export_depends_on_the_device(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """INT8 for TensorRT is on fp16; the trunk alike. Each refuses the other's file."""
    files = load_images(few_digits(tmp_path / "digits", 4))
    ranges = Int8Ranges(way="entropy", ranges=defaultdict(lambda: 8.0), kept=(), kl=0.0)
    monkeypatch.setattr(export, "calibrated", lambda *_: ranges)
    for tensorrt, held in ((False, "int8"), (True, "int8-fp16")):
        path = tmp_path / f"{held}.onnx"
        export.export_model(tiny("cls", 1), None, 1, path, "int8", files, tensorrt=tensorrt)
        assert onnx_precision_of(onnx.load(path)) == held

    given: list[Any] = []
    monkeypatch.setattr(
        "edgeprune.vit.profiling_models.export_profiling_models", lambda *args: given.append(args[4:])
    )
    for device, held, tensorrt in (("cpu", "int8", False), ("orin-nano", "int8-fp16", True)):
        trunk = tmp_path / device / "trunk.onnx"
        trunk.parent.mkdir()
        trunk.write_bytes((tmp_path / f"{held}.onnx").read_bytes())
        call(capsys, "export", "--trunk", "--precision", "int8", "--device", device, "--out", trunk.parent)
        assert (given[-1][0], given[-1][2]) == (held, tensorrt)

    target = target_for("orin-nano", "int8", simulate=True, work=tmp_path)
    with pytest.raises(InputError, match=r"int8\.onnx holds INT8 for ONNX Runtime: .* with --device orin-nano"):
        check_for_tensorrt(target, Inputs(tmp_path / "int8-fp16.onnx", dense=tmp_path / "int8.onnx"))
    check_for_tensorrt(target, Inputs(tmp_path / "int8-fp16.onnx"))


def test_more_tokens_than_tensorrt_sorts_are_refused_at_export(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fold sorts all 17 tokens of the tiny model, topk only the 8 that it keeps: a limit of 12 stands for 3840."""
    monkeypatch.setattr("edgeprune.onnx_graph.graph.MOST_SORTED", 12)
    model, reason = tiny("cls", 2), "a cut sorts 17 tokens, but TensorRT at most 12: cut later, use --method topk"
    for device, limited in (("orin-nano", True), ("cpu", False)):
        context = replace(context_of(model.vit, tmp_path / device), model=model)
        target = target_for(device, simulate=limited, work=tmp_path / device)
        context = replace(context, target=target)
        kept = Schedule(vit=model.vit, method="topk", policy="search", tokens=(9, 9))
        assert onnx_files.pruned_onnx(context, kept).is_file()
        folded = Schedule(vit=model.vit, method="fold", policy="search", tokens=(9, 9))
        if limited:
            with pytest.raises(ExportError, match=reason):
                onnx_files.pruned_onnx(context, folded)
        else:
            onnx_files.pruned_onnx(context, folded)
            with pytest.raises(ExportError, match=reason):
                check_for_tensorrt(target, Inputs(onnx_files.pruned_onnx(context, folded)))


def test_compare_in_int8(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned and unpruned model are timed in INT8; answers of INT8 files are judged by the unpruned one in fp32."""
    monkeypatch.setattr("edgeprune.images.CALIBRATION_IMAGES", 4)
    monkeypatch.setattr("edgeprune.latency.profiling.ROUNDS", 1)
    monkeypatch.setattr("edgeprune.pipeline.compare.SESSIONS", 1)
    few_digits(tmp_path / "digits", 45)
    options = Options(
        model=tiny("cls").module, images=tmp_path / "digits" / "images", search_images=4, precision="int8",
        rounds=5, neighbours=0, work=tmp_path / "work", calib=tmp_path / "calib",
    )  # fmt: skip
    found = compare(options, ("topk", "none"), (1.05,))
    assert found.setup.precision == "int8" and found.staircase.setup.precision == "int8"
    whole = next(entry.report for entry in found.entries if entry.method == "none")
    assert whole is not None and whole.kl is not None and whole.kl > 1e-6, "rounding is seen in its figures"
