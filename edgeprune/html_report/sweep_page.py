"""The page of a sweep: for each model and device its builds, and the Pareto front of latency and accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from edgeprune.html_report.charts import BOTTOM, HEIGHT, TOP, Axis, Chart, across
from edgeprune.html_report.figures import evaluated_on, number
from edgeprune.html_report.page import template_named
from edgeprune.version import __version__

HERE = Path(__file__).parent
HEAD = ("goal", "method", "precision", "batch", "latency, ms", "speed-up")
FIGURES = {  # in the table, by task
    "classify": ("top-1, %", "agreement, %", "KL, nats"),
    "embed": ("k-NN top-1, %", "same neighbour, %", "cosine"),
    "dense": ("cosine of the embedding", "relative error"),
}
NAMES = {"top1": "top-1, %", "agreement": "agreement with the unpruned model, %", "error": "relative error"}
Row = Mapping[str, Any]


class Group(NamedTuple):
    """All builds of one model on one device, as the template shows them."""

    title: str
    chart: Markup
    head: tuple[str, ...]
    figure: str
    methods: list[str]
    simulated: bool
    rows: list[dict[str, Any]]
    evaluated: str


def sweep_html(name: str, rows: Sequence[Row]) -> str:
    """The HTML text for rows of `sweep --json`: those of the command contract with `label`, `goal` and `error`."""
    built = [row for row in rows if row["error"] is None]
    groups = [_group([row for row in built if _key(row) == key]) for key in dict.fromkeys(map(_key, built))]
    models, devices = ({row[kind] for row in rows} for kind in ("label", "device"))
    return template_named("sweep.html.j2").render(
        version=__version__,
        css=Markup("".join((HERE / file).read_text(encoding="utf-8") for file in ("chart.css", "page.css"))),
        name=name,
        summary=f"{_count(len(models), 'model')} on {_count(len(devices), 'device')}: {_count(len(built), 'build')}",
        count=len(rows),
        groups=groups,
        simulated=list(dict.fromkeys(row["device"] for row in built if row.get("simulated"))),
        failures=[(row["job"], row["error"]) for row in rows if row["error"] is not None],
    )


def _key(row: Row) -> tuple[str, str, bool]:
    return row["label"], row["device"], bool(row.get("simulated"))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _group(rows: Sequence[Row]) -> Group:
    first = rows[0]
    task = (first["fidelity"] or {}).get("task", "classify")
    figure = "top1" if all(row["top1"] is not None for row in rows) else "agreement"
    figure = "error" if task == "dense" else figure
    front = pareto_rows(rows, figure)
    ordered = sorted(rows, key=picture_ms)
    return Group(
        title=f"{first['label']} on {first['device']}" + (", simulated" if first.get("simulated") else ""),
        chart=Markup(pareto_chart(rows, figure)),
        head=(*HEAD, *FIGURES[task]),
        figure=NAMES[figure].removesuffix(", %"),
        methods=sorted({row["method"] for row in rows}),
        simulated=bool(first.get("simulated")),
        rows=[{"front": row in front, "cells": _cells(row)} for row in ordered],
        evaluated=f"Accuracy on {evaluated_on(first['images'], first['held_out'])}" if first["images"] else "",
    )


def _cells(row: Row) -> tuple[str, ...]:
    found, dense = row["fidelity"] or {}, row["dense_latency_ms"]
    figures: tuple[str, ...] = (f"{number(row['top1'])} ({number(row['dense_top1'])})", number(row["agreement"]))
    loss = row["kl"] if row["kl"] is not None else found.get("cosine")
    if found.get("task") == "dense":
        figures, loss = (number(found["embedding_cosine"], 4),), found["error"]
    return (
        row["goal"], row["method"], row["precision"], str(row["batch"]),
        f"{row['latency_ms']['median']:.3f} ({number(dense['median'] if dense else None, 3)})",
        number(row["speedup"]), *figures, number(loss, 4),
    )  # fmt: skip


def figure_of(row: Row, figure: str) -> float | None:
    """A figure of NAMES of a row; None where it is unknown."""
    value: float | None = (row["fidelity"] or {}).get("error") if figure == "error" else row[figure]
    return value


def picture_ms(row: Row, latency: str = "latency_ms") -> float:
    """Median latency of one picture of the batch, ms: builds with different batches can be compared."""
    return float(row[latency]["median"] / row["batch"])


def pareto_rows(rows: Sequence[Row], figure: str) -> list[Row]:
    """The rows that no other beats in both latency of a picture and a figure of NAMES, fastest first."""
    front: list[Row] = []
    sign, best = -1 if figure == "error" else 1, -math.inf
    known = [(picture_ms(row), sign * value, row) for row in rows if (value := figure_of(row, figure)) is not None]
    for _, value, row in sorted(known, key=lambda one: (one[0], -one[1])):
        if value > best:
            best = value
            front.append(row)
    return front


def pareto_chart(rows: Sequence[Row], figure: str) -> Chart:
    """Latency of a picture against a figure of NAMES: every build, the front, and the unpruned models as stars."""
    known = [(row, value) for row in rows if (value := figure_of(row, figure)) is not None]
    perfect, text = (0.0, "{:.4f}") if figure == "error" else (100.0, "{:.2f} %")
    stars = {
        (picture_ms(row, "dense_latency_ms"), row["dense_top1"] if figure == "top1" else perfect)
        for row, _ in known
        if row["dense_latency_ms"] is not None
    }
    places = [(picture_ms(row), value) for row, value in known] + [star for star in stars if star[1] is not None]
    ms, values = ([place[i] for place in places] or [0.0] for i in (0, 1))
    room, space = 0.05 * (max(ms) - min(ms)), 0.08 * (max(values) - min(values)) or perfect / 100 or 0.01
    x = across(min(ms) - room, max(ms) + room)
    y = Axis(min(values) - space, max(min(max(values) + space, 100.0), max(values)), HEIGHT - BOTTOM, TOP)
    chart = Chart(f"Latency against {NAMES[figure]}", x, y, ("latency of one picture, ms", NAMES[figure]))
    front = pareto_rows(rows, figure)
    line = sorted((picture_ms(row), value) for row, value in known if row in front)
    chart.line([(x(at), y(value)) for at, value in line], "front")
    for row, value in known:
        at = picture_ms(row)
        about = f"{row['method']}, {row['precision']}, batch {row['batch']}, {row['goal']}"
        kind = f"series {row['method']} {row['policy']}"
        chart.dot(x(at), y(value), kind, f"{about}: {at:.3f} ms, {text.format(value)}", 3.5)
    for at, value in sorted(stars):
        chart.star(x(at), y(value), "star", f"unpruned: {at:.3f} ms, {text.format(value)}", 6)
    return chart
