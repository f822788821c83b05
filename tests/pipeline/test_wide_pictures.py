"""A user's own module of wide pictures, from `edgeprune.build` to the page, and --image-size on the command line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from support.builds import as_measured, call, few_digits, row_of
from support.processes import shallow_vit

import edgeprune
from edgeprune import zoo
from edgeprune.bundles.bundle import Bundle
from edgeprune.errors import InputError, RecordError
from edgeprune.html_report.gallery import pictures
from edgeprune.io import load
from edgeprune.records import BuildTrace, Preprocessing, Staircase

SIZE = (20, 28)


class Built(NamedTuple):
    """A bundle of a user's module."""

    module: Any
    before: dict[str, Any]  # its state
    bundle: Bundle
    pictures: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """timm's module with another head, resized, trained for a step, as the documentation of `build` has it."""
    base = tmp_path_factory.mktemp("wide")
    module = shallow_vit(3)
    module.reset_classifier(3)
    module.set_input_size(img_size=SIZE)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    images = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(module(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    folder = few_digits(base / "digits", 12).parent / "images"
    bundle = edgeprune.build(
        module, device="orin-nano", simulate=True, batch=32, images=folder, search_images=4, rounds=5, neighbours=0,
        method="topk", goal=edgeprune.Goal(speedup=1.5), work=base / "work", out=base / "bundle",
    )  # fmt: skip
    return Built(module, before, bundle, folder)


def test_the_bundle_has_the_size_and_the_head_of_the_module(built: Built) -> None:
    vit, how = built.bundle.schedule.vit, built.bundle.manifest.preprocessing
    assert (vit.size, vit.grid, vit.tokens, vit.classes) == (SIZE, (10, 14), 141, 3)
    assert isinstance(how, Preprocessing) and (how.size, how.resize_px) == (SIZE, SIZE)
    torch.testing.assert_close(built.module.state_dict(), built.before, atol=0, rtol=0)


def test_prune_gives_the_module_that_the_bundle_runs(built: Built) -> None:
    pruned = edgeprune.prune(built.module, built.bundle.schedule)
    with torch.inference_mode():
        found = pruned(torch.from_numpy(np.load(built.bundle.path / "golden_input.npy"))).numpy()
    np.testing.assert_allclose(found, np.load(built.bundle.path / "golden_output.npy"), atol=1e-3)
    with pytest.raises(
        InputError, match=r"of 20x28 px, the model takes 28: call model.set_input_size\(img_size=\(20"
    ):
        edgeprune.prune(zoo.vit_digits(), built.bundle.schedule)


def test_run_verify_and_triton_take_the_size(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert row_of(capsys, "verify", built.bundle.path)["ok"]
    Image.new("RGB", (90, 33), (10, 200, 30)).save(tmp_path / "wide.png")  # of any other shape
    rows = row_of(capsys, "run", built.bundle.path, tmp_path / "wide.png", built.pictures)["rows"]
    assert len(rows) == 13 and all(len(row["top"]) == 3 for row in rows)
    copy = as_measured(built.bundle.path, tmp_path / "copy")
    assert call(capsys, "export-triton", copy, tmp_path / "repository", "--name", "wide")[0] == 0
    assert "dims: [32, 3, 20, 28]" in (tmp_path / "repository" / "wide" / "config.pbtxt").read_text()


def test_the_page_draws_the_grid(built: Built) -> None:
    page, trace = (built.bundle.path / "report.html").read_text(), load(built.bundle.path / "story.json", BuildTrace)
    assert trace.samples and all(len(cut) == 140 for sample in trace.samples for cut in sample.groups)
    assert 'viewBox="0 0 14 10"' in page and 'width="14" height="10"' in page and "crop of 20x28 px" in page
    corners = re.findall(r"M(\d+) (\d+)h1v1h-1z", page)
    assert max(int(x) for x, _ in corners) <= 13 and max(int(y) for _, y in corners) <= 9
    with pytest.raises(RecordError, match="divided into 3 patches, not the 10x14 of the model"):
        cut = tuple(each[:3] for each in trace.samples[0].groups)
        pictures(built.bundle.schedule, [type(trace.samples[0])(picture=trace.samples[0].picture, groups=cut)])


def test_every_command_that_loads_a_model_takes_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tmp_path / "wide.json"
    simulated = ("--simulate", "--device", "orin-nano")
    row_of(capsys, "profile", *simulated, "--image-size", "28,56", "--out", wide)
    assert load(wide, Staircase).vit.image_px == (28, 56) and load(wide, Staircase).vit.tokens == 14 * 28 + 1
    places = ("--work", tmp_path / "work")
    commands: dict[str, tuple[object, ...]] = {
        "build": (*simulated, *places), "compare": (*simulated, *places), "profile": simulated,
        "export": ("--dense", "--out", tmp_path / "model.onnx"), "schedule": (wide, *places),
    }  # fmt: skip
    for command, options in commands.items():
        for size, message in (
            ("27,56", "--image-size 27,56 does not divide into the patches of vit_digits, 2x2 px: pass 28,56"),
            ("0", "--image-size '0': pass H,W in pixels, or one number for a square, 1 to 8192 each"),
            ("1,2,3", "--image-size '1,2,3': pass H,W in pixels"),
        ):
            code, out, err = call(capsys, command, *options, "--image-size", size)
            assert code == 1 and out == "" and message in err.splitlines()[-1], (command, err)
    assert not (tmp_path / "model.onnx").exists()
    shutil.copy(wide, tmp_path / "trunk.onnx")
    code, _, err = call(capsys, "profile", "--trunk", tmp_path / "trunk.onnx", "--image-size", "28")
    assert code == 1 and "has one size of pictures: pass --image-size to edgeprune export --trunk" in err
