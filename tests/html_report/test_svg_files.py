"""SVG files: valid XML with their own style, whole whatever the names, the same bytes for the same figures."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from support.page_records import HOSTILE, compare_row, records

from edgeprune.html_report.files import compare_svg, staircase_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(file: bytes) -> tuple[ElementTree.Element, str]:
    """The root of an SVG file and all text that it shows."""
    root = ElementTree.fromstring(file)
    assert root.tag == f"{SVG}svg"
    return root, "\n".join(text.text or "" for text in root.iter(f"{SVG}text"))


def classes(root: ElementTree.Element, tag: str) -> list[str]:
    return [part.get("class", "") for part in root.iter(f"{SVG}{tag}")]


ROWS = [
    compare_row("fold", "search", 8.0, agreement=97.0, top1=82.0),
    compare_row("fold", "search", 6.0, agreement=90.0, top1=80.0),
    compare_row("tome", "published", 7.0, agreement=85.0, top1=79.0),
]


@pytest.mark.parametrize("simulated", [True, False])
def test_staircase_says_what_it_is_of(simulated: bool) -> None:
    given = records("a <name>", simulated=simulated)
    _, text = drawn(staircase_svg(given["staircase"], given["schedule"]))
    assert "a <name> on a <name>" in text and "fp32, batch 1" in text
    assert ("SIMULATED" in text) is simulated


def test_the_schedule_is_marked_where_there_is_one() -> None:
    given = records()
    with_it, text = drawn(staircase_svg(given["staircase"], given["schedule"]))
    assert classes(with_it, "circle").count("chosen") == 4 and "in the schedule" in text  # 17, 12, 6 and the legend
    without, text = drawn(staircase_svg(given["staircase"]))
    assert "chosen" not in classes(without, "circle") and "in the schedule" not in text


def test_compare_draws_a_line_for_each_method_and_policy() -> None:
    root, text = drawn(compare_svg(ROWS))
    assert "toy on test" in text and "SIMULATED: simulated 1, fp16, batch 4" in text
    assert classes(root, "circle").count("series fold search") == 2 * 2 + 1  # in two panels, and in the legend
    assert classes(root, "circle").count("series tome published") == 2 * 1 + 1
    assert classes(root, "path").count("series fold search") == 2 + 1
    assert classes(root, "path").count("star") == 2 + 1
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles.count("fold, search: 8.000 ms, 97.00 %") == 1
    assert titles.count("unpruned: 10.000 ms, 82.80 %") == titles.count("unpruned: 10.000 ms, 100.00 %") == 1


def test_compare_without_labels_has_one_panel() -> None:
    rows: list[dict[str, Any]] = [row | {"top1": None, "dense_top1": None} for row in ROWS]
    root, text = drawn(compare_svg(rows))
    assert classes(root, "path").count("star") == 1 + 1 and "top-1" not in text


def test_files_carry_their_style_and_repeat() -> None:
    given = records()
    for one, again in (
        (staircase_svg(given["staircase"]), staircase_svg(given["staircase"])),
        (compare_svg(ROWS), compare_svg(ROWS)),
    ):
        assert one == again
        root, _ = drawn(one)
        style = root.findtext(f"{SVG}style") or ""
        used = {name for part in root.iter() for name in part.get("class", "").split()}
        named = set(re.findall(r"\.([a-z][\w-]*)", style))
        assert "var(" not in style and "url(" not in style and "@import" not in style
        assert used - named <= {"tick", "label", "search"}  # those look like all text, and like all lines


@pytest.mark.parametrize("name", [HOSTILE, "\x00\x08\ufffe", "n" * 500, "]]>"])
def test_no_name_breaks_a_file(name: str) -> None:
    given = records()
    setup = msgspec.structs.replace(given["staircase"].setup, device=name, runtime=name)
    _, text = drawn(staircase_svg(msgspec.structs.replace(given["staircase"], setup=setup), given["schedule"]))
    assert max(map(len, text.splitlines())) <= 52
    root, _ = drawn(compare_svg([row | {"model": name, "method": name, "policy": name} for row in ROWS]))
    assert not {"script", "img"} & {part.tag.removeprefix(SVG) for part in root.iter()}
