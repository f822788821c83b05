"""Charts as separate SVG files: with embedded style, the same bytes for the same figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from edgeprune.html_report.charts import BOTTOM, HEIGHT, TOP, WIDTH, Axis, Chart, Drawing, across, staircase_chart
from edgeprune.records import Schedule, Staircase

HERE = Path(__file__).parent
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML does not allow
MARGIN, TITLE, ROW = 16, 48, 18  # user units: margin, height of the title, height of a line of the legend
LINE = 52  # characters of the title that fit above a panel
Key = tuple[str, str, str]  # mark ("dot", "line", "band" or "star"), class, text


def staircase_svg(staircase: Staircase, schedule: Schedule | None = None) -> bytes:
    """The staircase as an SVG file, with the token counts of `schedule` where one is given."""
    keys: list[Key] = [
        ("band", "band", "95 % interval of the median"),
        ("dot", "point", "measured token count"),
        ("line", "tread", "tread"),
        ("dot", "tread-end", "right end of a tread"),
        ("dot", "chosen", "in the schedule"),
    ]
    setup = staircase.setup
    about = {"model": staircase.vit.name, "simulated": setup.simulated, **msgspec.structs.asdict(setup)}
    return _file(_title(about), [staircase_chart(staircase, schedule)], keys[: None if schedule else -1])


def compare_svg(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of `compare --json` (one or more) as an SVG file: measured latency against agreement, top-1 or error."""
    groups = sorted({(row["method"], row["policy"]) for row in rows})
    keys: list[Key] = [("line", _kind(*group), ", ".join(group)) for group in groups]
    keys.append(("star", "star", "unpruned"))
    if (rows[0].get("fidelity") or {}).get("task") == "dense":
        rows = [{**row, "error": 100 * row["fidelity"]["error"]} for row in rows]
        return _file(_title(rows[0]), [_panel(rows, groups, "error", 0.0)], keys)
    panels = [_panel(rows, groups, "agreement", 100.0)]
    if any(row["top1"] is not None for row in rows):
        panels.append(_panel(rows, groups, "top1", rows[0]["dense_top1"]))
    return _file(_title(rows[0]), panels, keys)


def _panel(
    rows: Sequence[Mapping[str, Any]], groups: Sequence[tuple[str, str]], key: str, dense: float | None
) -> Chart:
    """Measured latency against one figure in percent, with a line for each method and policy."""
    known = [row for row in rows if row[key] is not None]
    dense_ms = rows[0]["dense_latency_ms"]["median"]
    ms = [dense_ms, *(row["latency_ms"]["median"] for row in known)]
    values = [row[key] for row in known] + ([] if dense is None else [dense])
    low, high = min(values, default=0.0), max(values, default=100.0)
    room, space = 0.05 * (max(ms) - min(ms)), 0.05 * (high - low) or 1
    x = across(min(ms) - room, max(ms) + room)
    y = Axis(low - space, high + space, HEIGHT - BOTTOM, TOP)
    what = {
        "agreement": "agreement with the unpruned model, %", "top1": "top-1, %", "error": "relative error, %"
    }[key]  # fmt: skip
    chart = Chart(f"Latency against {what}", x, y, ("measured latency, ms", what))
    for method, policy in groups:
        series = [row for row in known if (row["method"], row["policy"]) == (method, policy)]
        places = sorted((row["latency_ms"]["median"], row[key]) for row in series)
        if len(places) > 1:
            chart.line([(x(a), y(b)) for a, b in places], _kind(method, policy))
        for a, b in places:
            tooltip = f"{method}, {policy}: {a:.3f} ms, {b:.2f} %"
            chart.dot(x(a), y(b), _kind(method, policy), tooltip, 3.5)
    if dense is not None:
        chart.star(x(dense_ms), y(dense), "star", f"unpruned: {dense_ms:.3f} ms, {dense:.2f} %")
    return chart


def _kind(method: str, policy: str) -> str:
    """The CSS classes of a line of the Pareto plot; chart.css has a colour for each method."""
    return f"series {escape(method)} {escape(policy)}"


def _title(about: Mapping[str, Any]) -> tuple[str, str]:
    """The two lines of the title: model and device, and how it was measured."""
    how = f"{about['runtime']} {about['runtime_version']}, {about['precision']}, batch {about['batch']}"
    return f"{about['model']} on {about['device']}", ("SIMULATED: " if about.get("simulated") else "") + how


def _file(title: tuple[str, str], panels: Sequence[Chart], keys: Sequence[Key]) -> bytes:
    """Panels side by side below a title and above a legend, as a whole SVG file."""
    width = len(panels) * (WIDTH + MARGIN) + MARGIN
    columns = 2 * len(panels)
    step = (width - 2 * MARGIN) / columns
    foot = TITLE + max(panel.height for panel in panels) + MARGIN
    height = foot + ROW * -(-len(keys) // columns) + MARGIN / 2
    most = LINE * len(panels)
    first, second = (line if len(line) <= most else f"{line[: most - 1]}…" for line in title)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height:g}" '
        f'width="{1.5 * width:g}" height="{1.5 * height:g}" role="img">',
        f"<title>{escape(', '.join(title))}</title><style>{_style()}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
        f'<text class="strong" x="{MARGIN}" y="22">{escape(first)}</text>',
        f'<text x="{MARGIN}" y="38">{escape(second)}</text>',
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({MARGIN + index * (WIDTH + MARGIN)} {TITLE})">{panel.body}</g>')
    for index, key in enumerate(keys):
        row, column = divmod(index, columns)
        parts.append(_key(MARGIN + column * step, foot + row * ROW, key))
    return NOT_XML.sub("\ufffd", "\n".join((*parts, "</svg>\n"))).encode()


def _key(x: float, y: float, key: Key) -> str:
    """An entry of the legend; `y` is the middle of its line."""
    mark, kind, text = key
    drawing = Drawing()
    if mark == "line":
        drawing.line([(x, y), (x + 20, y)], kind)
    elif mark == "band":
        drawing.bar(x, y - 4, 20, 8, kind, text)
    if mark == "dot" or "series" in kind:
        drawing.dot(x + 10, y, kind, text, 3.5)
    if mark == "star":
        drawing.star(x + 10, y, kind, text)
    drawing.text(text, x + 28, y + 4, "start", "ink")
    return drawing.body


def _style() -> str:
    """chart.css with the colours of the light theme instead of CSS variables, which some viewers do not support."""
    light = (HERE / "page.css").read_text(encoding="utf-8").partition("}")[0]
    colours = dict(re.findall(r"(--[\w-]+): (#\w+)", light))
    css = (HERE / "chart.css").read_text(encoding="utf-8") + ".chart { font-family: system-ui, sans-serif; }\n"
    return re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], css)
