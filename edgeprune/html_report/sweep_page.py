"""The page of a sweep: for each model and device its builds, and the Pareto front of latency and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from edgeprune.html_report.charts import BOTTOM, HEIGHT, TOP, Axis, Chart, across
from edgeprune.html_report.figures import evaluated_on, number
from edgeprune.html_report.page import template_named
from edgeprune.version import __version__

HERE = Path(__file__).parent
HEAD = (
    "goal", "method", "precision", "batch", "latency, ms", "speed-up", "top-1, %", "agreement, %", "KL or cosine",
)  # fmt: skip
NAMES = {"top1": "top-1, %", "agreement": "agreement with the unpruned model, %"}
Row = Mapping[str, Any]


class Group(NamedTuple):
    """All builds of one model on one device, as the template shows them."""

    title: str
    chart: Markup
    figure: str
    methods: list[str]
    simulated: bool
    rows: list[dict[str, Any]]
    evaluated: str


def sweep_html(name: str, rows: Sequence[Row]) -> str:
    """The HTML text for rows of `sweep --json`, which are those of the command contract with `goal` and `error`."""
    built = [row for row in rows if row["error"] is None]
    keys = dict.fromkeys((row["model"], row["device"], bool(row.get("simulated"))) for row in built)
    groups = [_group([row for row in built if _key(row) == key]) for key in keys]
    models, devices = ({row[kind] for row in rows} for kind in ("model", "device"))
    return template_named("sweep.html.j2").render(
        version=__version__,
        css=Markup("".join((HERE / file).read_text(encoding="utf-8") for file in ("chart.css", "page.css"))),
        name=name,
        summary=f"{_count(len(models), 'model')} on {_count(len(devices), 'device')}: {_count(len(built), 'build')}",
        count=len(rows),
        head=HEAD,
        groups=groups,
        simulated=list(dict.fromkeys(row["device"] for row in built if row.get("simulated"))),
        failures=[(row["job"], row["error"]) for row in rows if row["error"] is not None],
    )


def _key(row: Row) -> tuple[str, str, bool]:
    return row["model"], row["device"], bool(row.get("simulated"))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _group(rows: Sequence[Row]) -> Group:
    figure = "top1" if all(row["top1"] is not None for row in rows) else "agreement"
    first = rows[0]
    front = pareto_rows(rows, figure)
    ordered = sorted(rows, key=picture_ms)
    return Group(
        title=f"{first['model']} on {first['device']}" + (", simulated" if first.get("simulated") else ""),
        chart=Markup(pareto_chart(rows, figure)),
        figure=NAMES[figure].removesuffix(", %"),
        methods=sorted({row["method"] for row in rows}),
        simulated=bool(first.get("simulated")),
        rows=[{"front": row in front, "cells": _cells(row)} for row in ordered],
        evaluated=f"Accuracy on {evaluated_on(first['images'], first['held_out'])}" if first["images"] else "",
    )


def _cells(row: Row) -> tuple[str, ...]:
    loss = row["kl"] if row["kl"] is not None else (row["fidelity"] or {}).get("cosine")
    dense = row["dense_latency_ms"]
    return (
        row["goal"], row["method"], row["precision"], str(row["batch"]),
        f"{row['latency_ms']['median']:.3f} ({number(dense['median'] if dense else None, 3)})",
        number(row["speedup"]), f"{number(row['top1'])} ({number(row['dense_top1'])})", number(row["agreement"]),
        number(loss, 4),
    )  # fmt: skip


def picture_ms(row: Row, latency: str = "latency_ms") -> float:
    """Median latency of one picture of the batch, ms: builds with different batches can be compared."""
    return float(row[latency]["median"] / row["batch"])


def pareto_rows(rows: Sequence[Row], figure: str) -> list[Row]:
    """The rows that no other beats in both latency of a picture and a figure (percent), fastest first."""
    front: list[Row] = []
    known = [row for row in rows if row[figure] is not None]
    for row in sorted(known, key=lambda r: (picture_ms(r), -r[figure])):
        if not front or row[figure] > front[-1][figure]:
            front.append(row)
    return front


def pareto_chart(rows: Sequence[Row], figure: str) -> Chart:
    """Latency of a picture against a figure in percent: every build, the front, and the unpruned models as stars."""
    known = [row for row in rows if row[figure] is not None]
    stars = {
        (picture_ms(row, "dense_latency_ms"), row["dense_top1"] if figure == "top1" else 100.0)
        for row in known
        if row["dense_latency_ms"] is not None
    }
    places = [(picture_ms(row), row[figure]) for row in known] + [star for star in stars if star[1] is not None]
    ms, values = ([place[i] for place in places] or [0.0] for i in (0, 1))
    room, space = 0.05 * (max(ms) - min(ms)), 0.08 * (max(values) - min(values)) or 1
    x = across(min(ms) - room, max(ms) + room)
    y = Axis(min(values) - space, max(min(max(values) + space, 100.0), max(values)), HEIGHT - BOTTOM, TOP)
    chart = Chart(f"Latency against {NAMES[figure]}", x, y, ("latency of one picture, ms", NAMES[figure]))
    chart.line([(x(picture_ms(row)), y(row[figure])) for row in pareto_rows(rows, figure)], "front")
    for row in known:
        at = picture_ms(row)
        about = f"{row['method']}, {row['precision']}, batch {row['batch']}, {row['goal']}"
        kind = f"series {row['method']} {row['policy']}"
        chart.dot(x(at), y(row[figure]), kind, f"{about}: {at:.3f} ms, {row[figure]:.2f} %", 3.5)
    for at, value in sorted(stars):
        chart.star(x(at), y(value), "star", f"unpruned: {at:.3f} ms, {value:.2f} %", 6)
    return chart
