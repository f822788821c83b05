"""The page of a bundle: what it says for each outcome, what it escapes, and where `report` puts it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.builds import Shared, call, row_of
from support.page_records import HOSTILE, records

from edgeprune.errors import InputError
from edgeprune.html_report.page import page_html, page_of_bundle
from edgeprune.records import BuildTrace, Recovery, Sample, Unrecovered


class Tags(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed, another is open"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ({}, "1.50× faster, 0.9 points of top-1 lost"),
        ({"top1": 83.1}, "1.50× faster, 0.3 points of top-1 gained"),
        ({"top1": 82.79}, "1.50× faster, less than 0.1 points of top-1 lost"),
        ({"top1": 82.8}, "1.50× faster, no top-1 lost"),
        ({"top1": None, "dense_top1": None}, "1.50× faster, 95.2 % of answers unchanged"),
        (dict.fromkeys(("top1", "dense_top1", "agreement", "kl")), "1.50× faster, accuracy not measured"),
    ],
)
def test_first_line_says_what_was_gained(figures: dict[str, Any], line: str) -> None:
    assert f"<h1>{line}</h1>" in page_html(**records(**figures))


def test_a_slower_engine_is_not_called_faster() -> None:
    given = records()
    given["report"] = msgspec.structs.replace(given["report"], speedup=0.97)
    assert "<h1>0.97× as fast, " in page_html(**given)


@pytest.mark.parametrize("name", ["toy", HOSTILE])
def test_markup_is_whole_and_loads_nothing(name: str) -> None:
    found = Tags(page_html(**records(name)))
    assert not found.open
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in found.tags}
    links = [v or "" for _, attributes in found.tags for k, v in attributes.items() if k in ("href", "src")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not [k for _, attributes in found.tags for k in attributes if k.startswith("on")]
    assert name in found.text
    assert "url(" not in page_html(**records(name)) and "@import" not in page_html(**records(name))


def test_same_records_same_text() -> None:
    assert page_html(**records()) == page_html(**records())


def test_figures_are_those_of_the_records() -> None:
    text = Tags(page_html(**records())).text
    for figure in ("8.000", "12.000", "1.500 (1.400 to 1.600)", "82.80", "81.90", "95.25", "0.0310", "17, 12, 6, 6"):
        assert figure in text
    assert "2, chosen: predicted 8.1, measured 8 ms (+1.2 %)" in text
    assert "650 images" in text and "4 schedules evaluated" in text


def test_simulated_latency_says_so() -> None:
    simulated, measured = (Tags(page_html(**records(simulated=s))).text for s in (True, False))
    assert simulated.count("SIMULATED") == 6  # in the first line and below it, at each chart of latency, in the setup
    assert "1.50× faster (SIMULATED), 0.9 points" in simulated
    assert "SIMULATED" not in measured


def test_what_is_unknown_is_left_out_or_said() -> None:
    given = records()
    figures = dict.fromkeys(("dense_latency", "speedup", "speedup_interval", "dense_top1", "agreement", "kl"))
    bare = msgspec.structs.replace(given["report"], **figures)
    text = Tags(page_html(**given | {"report": bare, "staircase": None, "trace": BuildTrace()})).text
    assert text.startswith("\n") and "8.00 ms, 81.9 % top-1" in text and "None" not in text
    for unknown in ("speed-up (95 % interval)", "agreement, %", "KL, nats"):
        assert re.search(rf"{re.escape(unknown)}\s*–\s*–", text), unknown
    for missing in ("This bundle has no staircase", "There was no search", "There is no prediction"):
        assert missing in text
    assert "goal:" not in text and "Every measured token count" not in text
    predicted = msgspec.structs.replace(bare, predicted_ms=8.4)
    page = page_html(**given | {"report": predicted, "trace": BuildTrace()})
    assert "1, chosen: predicted 8.4, measured 8 ms (+5.0 %)" in page


RECOVERY = Recovery(
    images=650, validation_images=162, epochs=2, kl_before=0.4, kl_after=0.19, curve=(0.4, 0.25, 0.19, 0.2),
    rate=3e-5, seed=0, weights_sha256="0" * 64,
)  # fmt: skip


def test_recovery_is_drawn_and_its_gain_is_told() -> None:
    before = Unrecovered(agreement=80.5, kl=0.387, top1=73.25, agreement_error=1.2, kl_error=0.0123, top1_error=1.1)
    page = page_html(**records(unrecovered=before), recovery=RECOVERY)
    text = Tags(page).text
    assert "weights recovered in 2 epochs on 488 unlabelled pictures, validated on 162 others" in text
    assert "KL 0.4 → 0.19" in text and "epoch 2, kept: 0.1900 nats" in page and "epoch 3: 0.2000 nats" in page
    rows = ("top-1, %|82.80|73.25 (±1.10)|81.90", "KL, nats|0|0.3870 (±0.0123)|0.0310")
    for row in rows:
        name, *cells = row.split("|")
        assert f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{c}</td>" for c in cells) in page
    assert "standard error of the change" in text and "recovery" not in Tags(page_html(**records())).text


def test_a_recovery_without_gain_says_so() -> None:
    same = msgspec.structs.replace(RECOVERY, epochs=0, kl_after=0.4, curve=(0.4, 0.5))
    text = Tags(page_html(**records(), recovery=same)).text
    assert "weights unchanged: no epoch of recovery lowered the KL" in text


def test_no_search_and_no_cut() -> None:
    given = records(method="none")
    given["schedule"] = msgspec.structs.replace(given["schedule"], tokens=(17,) * 4)
    given["trace"] = msgspec.structs.replace(given["trace"], candidates=(), samples=())
    text = Tags(page_html(**given)).text
    assert "There was no search" in text and "Tokens kept" not in text


def test_patches_without_a_token_are_dimmed_and_explained() -> None:
    page = page_html(**records())
    assert 'class="gone" d="M0 0h1v1h-1zM1 0h1v1h-1zM2 0h1v1h-1zM3 0h1v1h-1z"' in page
    assert "dark patches have none" in page


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        (True, "650 images not used to choose the schedule"),
        (False, "650 images, some also used to choose the schedule: pass more --images for unbiased figures"),
        (None, "650 images"),
    ],
)
def test_says_whether_the_schedule_was_chosen_on_the_pictures(held_out: bool | None, words: str) -> None:
    page = page_html(**records(held_out=held_out))
    assert f"<span>top-1 on {words}</span>" in page and f"accuracy on</th><td>{words}</td>" in page
    unlabelled = page_html(**records(held_out=held_out, top1=None, dense_top1=None))
    assert f"<span>agreement with the unpruned model, on {words}</span>" in unlabelled


def test_chosen_counts_stand_on_the_staircase() -> None:
    titles = re.findall(r"<title>(\d+) tokens, chosen: ([\d.]+) ms</title>", page_html(**records()))
    assert sorted(titles) == [("12", "7.000"), ("17", "9.500"), ("6", "4.000")]


# --- in a bundle, and the command that draws it again ---


def test_bundle_holds_its_page(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    assert row_of(capsys, "report", shared.bundle) == {"path": str(shared.bundle / "report.html")}
    trace = json.loads((shared.bundle / "story.json").read_text())
    row = shared.row
    assert row["tokens"] in [trial["tokens"] for trial in trace["trials"]]
    assert row["tokens"] in [candidate["tokens"] for candidate in trace["candidates"]]
    cuts = sum(a > b for a, b in zip([197, *row["tokens"]], row["tokens"], strict=False))
    if cuts:  # on a noisy machine the last block alone may pass for what was asked
        assert [len(sample["groups"]) for sample in trace["samples"]] == [cuts] * 4
        assert {len(groups) for sample in trace["samples"] for groups in sample["groups"]} == {196}
    else:
        assert trace["samples"] == []


def copied(bundle: Path, folder: Path, change: Callable[[Path, dict[str, Any]], None]) -> Path:
    """A copy of a bundle with a changed manifest."""
    copy = folder / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(copy, manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_a_page_of_another_version_is_left_alone(shared: Shared, tmp_path: Path) -> None:
    def without_page(copy: Path, manifest: dict[str, Any]) -> None:
        (copy / "report.html").unlink()
        del manifest["files"]["report.html"]

    copy = copied(shared.bundle, tmp_path, without_page)
    before = sorted(copy.iterdir())
    path = page_of_bundle(copy)
    assert path == tmp_path / "bundle.html"
    assert path.read_bytes() == (shared.bundle / "report.html").read_bytes()
    assert sorted(copy.iterdir()) == before


def test_out_and_open(
    shared: Shared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or len(opened) == 1)
    out = tmp_path / "deep" / "a page.html"
    code, said, _ = call(capsys, "report", shared.bundle, "--out", out, "--open")
    assert (code, said) == (0, f"report: {out}\n")
    assert opened == [out.as_uri()] and out.read_bytes() == (shared.bundle / "report.html").read_bytes()
    code, said, err = call(capsys, "report", shared.bundle, "--open")
    assert code == 1 and said and "no browser" in err


def test_what_report_refuses(shared: Shared, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a bundle"):
        page_of_bundle(tmp_path)

    def without_story(copy: Path, manifest: dict[str, Any]) -> None:
        del manifest["files"]["story.json"]

    with pytest.raises(InputError, match=r"story\.json is missing: build the bundle again"):
        page_of_bundle(copied(shared.bundle, tmp_path, without_story))


def test_groups_of_a_sample_are_of_the_same_patches() -> None:
    with pytest.raises(ValueError, match="same number of patches"):
        Sample(picture=b"", label=None, unpruned="", pruned="", groups=((1, 2, 3), (1, 2)))
