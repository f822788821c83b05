"""Charts: axes with round ticks inside, values at their places, and nothing that breaks where all values are one."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
import pytest

from edgeprune.html_report.charts import Axis, across, front_chart, staircase_chart, tokens_chart, trials_chart
from edgeprune.html_report.gallery import colours
from edgeprune.records import Candidate, Latency, Schedule, Staircase, Trial, Vit
from edgeprune.tasks import CLASSIFY


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 43, ["0", "10", "20", "30", "40"]),
        (20, 197, ["50", "100", "150"]),
        (0.5019, 0.5032, ["0.502", "0.5025", "0.503"]),
        (0, 1200, ["0", "200", "400", "600", "800", "1000", "1200"]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, texts: list[str]) -> None:
    ticks = Axis(low, high, 0, 100).ticks()
    assert [text for _, text in ticks] == texts
    assert all(low - 1e-9 <= value <= high + 1e-9 and float(text) == pytest.approx(value) for value, text in ticks)


def test_logarithmic_ticks_are_powers_of_ten() -> None:
    axis = Axis(1e-5, 10, 200, 0, log=True)
    assert [text for _, text in axis.ticks()] == ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "10⁰", "10¹"]
    assert axis(1e-5) == pytest.approx(200) and axis(1e-2) == pytest.approx(100) and axis(10) == pytest.approx(0)


def test_an_axis_of_one_value_has_room() -> None:
    axis = across(3, 3)
    assert axis.low < 3 < axis.high and across(0, 0).low < across(0, 0).high


def schedule_of(vit: Vit, tokens: tuple[int, ...]) -> Schedule:
    """A searched fold schedule."""
    return Schedule(vit=vit, method="fold", policy="search", tokens=tokens)


def test_bars_are_as_high_as_their_tokens(make_vit: Callable[..., Vit]) -> None:
    vit = make_vit(depth=4, tokens=100)
    drawn = str(tokens_chart(schedule_of(vit, (100, 50, 50, 25))))
    bars = re.findall(r'<rect class="(bar[ \w]*)" .*?height="([\d.]+)"', drawn)
    heights = [float(height) for _, height in bars]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 0.5, 0.5, 0.25], abs=0.001)
    assert [kind for kind, _ in bars] == ["bar", "bar cut", "bar", "bar cut"]


def test_treads_are_steps(make_staircase: Callable[..., Staircase], make_vit: Callable[..., Vit]) -> None:
    staircase = make_staircase({25: 1.0, 50: 2.0, 75: 2.0, 100: 4.0})
    vit = msgspec.structs.replace(staircase.vit, depth=1)
    drawn = str(staircase_chart(staircase, schedule_of(vit, (75,))))
    (path,) = re.findall(r'<path class="tread" d="M([^"]+)"', drawn)
    corners = [tuple(map(float, corner.split(","))) for corner in path.split()]
    assert len(corners) == 6  # three treads: 25, 75 and 100
    assert all(a[1] == b[1] for a, b in zip(corners[::2], corners[1::2], strict=True))
    assert "75 tokens, chosen: 2.000 ms" in drawn


def test_one_value_of_each_still_gives_charts(make_vit: Callable[..., Vit]) -> None:
    schedule = schedule_of(make_vit(depth=1, tokens=20), (20,))
    only = Candidate((20,), 2.0, 0.0, 100.0, None)
    drawn = str(front_chart([only], [], schedule, 2.0, CLASSIFY))
    assert "chosen: 2.000 ms (1.00×), KL 0.0000, tokens 20" in drawn and "nan" not in drawn
    trial = Trial(tokens=(20,), predicted_ms=2.0, latency=Latency(samples_ms=(2.0,)))
    assert "1, chosen: predicted 2, measured 2 ms (+0.0 %)" in str(trials_chart([trial], schedule))


def test_patches_are_coloured_by_group() -> None:
    drawn = colours((5, 5, 7, -1, 5, 5, 8, -1, 1, 2, 3, 9, 4, 9, 9, 9), 4)  # a square, loners, dropped ones, an L
    fills = dict(re.findall(r'<path class="(\w+)" d="([^"]*)"', drawn))
    assert fills["gone"] == "M3 0h1v1h-1zM3 1h1v1h-1z"
    square, rest = (text for name, text in sorted(fills.items()) if name.startswith("g") and name != "gone")
    assert square == "M0 0h1v1h-1zM1 0h1v1h-1zM0 1h1v1h-1zM1 1h1v1h-1z"
    assert rest == "M3 2h1v1h-1zM1 3h1v1h-1zM2 3h1v1h-1zM3 3h1v1h-1z"
    assert "M1 2v1" not in fills["border"] and "M2 0v1" in fills["border"]  # none between loners, one around a group
