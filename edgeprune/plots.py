"""Plots as SVG, the same bytes for the same figures; nothing where matplotlib (extra `report`) is missing."""

from __future__ import annotations

import io
from typing import Any

from edgeprune.records import Schedule, Staircase
from edgeprune.staircase import treads

DENSE_COLOUR, PRUNED_COLOUR, TREAD_COLOUR = "#767676", "#1a7f37", "#0969da"
SVG_STYLE = {"svg.hashsalt": "edgeprune", "font.size": 10, "svg.fonttype": "none"}
METHOD_COLOURS = {
    "fold": "#1a7f37",
    "tome": "#0969da",
    "pomt": "#bc4c00",
    "evit": "#8250df",
    "topk": "#cf222e",
    "none": "#767676",
}


def staircase_svg(staircase: Staircase, schedule: Schedule | None = None) -> dict[str, bytes]:
    """The plot of a staircase as {"staircase.svg": bytes}; empty without matplotlib (extra `report`)."""
    plt = _pyplot()
    if plt is None:
        return {}
    ends = treads(staircase)
    x = [p.tokens for p in staircase.points]
    y = [p.latency.median_ms for p in staircase.points]
    low, high = zip(*(p.latency.interval_ms for p in staircase.points), strict=True)
    with plt.rc_context(SVG_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        axes.fill_between(x, low, high, step=None, color=DENSE_COLOUR, alpha=0.3, lw=0, label="95 % interval")
        axes.plot(x, y, color=DENSE_COLOUR, lw=1, marker=".", ms=4, label="median")
        tops = [y[x.index(n)] for n in ends]
        axes.plot(ends, tops, "o", color=TREAD_COLOUR, ms=5, mfc="none", label="right end of a tread")
        if schedule is not None:
            for index, count in enumerate(sorted(set(schedule.tokens))):
                axes.axvline(count, color=PRUNED_COLOUR, lw=1.5, ls="--", label=None if index else "chosen")
        setup = staircase.setup
        simulated = ", SIMULATED" if setup.simulated else ""
        axes.set(
            xlabel="tokens in every block",
            ylabel="latency of all blocks, ms",
            title=f"{staircase.vit.name} on {setup.device} ({setup.runtime} {setup.runtime_version}, "
            f"{setup.precision}, batch {setup.batch}{simulated})",
            ylim=(0, None),
        )
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        return {"staircase.svg": _svg(figure, plt)}


def compare_svg(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Measured latency against agreement and top-1; empty without matplotlib (extra `report`)."""
    plt = _pyplot()
    if plt is None or not rows:
        return {}
    with plt.rc_context(SVG_STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
        for axes, key, dense in ((panels[0], "agreement", 100.0), (panels[1], "top1", rows[0]["dense_top1"])):
            for method, policy in sorted({(r["method"], r["policy"]) for r in rows}):
                mine = [r for r in rows if (r["method"], r["policy"]) == (method, policy) and r[key] is not None]
                mine.sort(key=lambda r: float(r["latency_ms"]["median"]))
                axes.plot(
                    [r["latency_ms"]["median"] for r in mine],
                    [r[key] for r in mine],
                    color=METHOD_COLOURS.get(method, "#000000"),
                    ls="-" if policy == "search" else "--",
                    marker="o" if policy == "search" else "s",
                    mfc=None if policy == "search" else "none",
                    ms=5,
                    lw=1.2,
                    label=f"{method}, {policy}",
                )
            if dense is not None:
                axes.plot(rows[0]["dense_latency_ms"]["median"], dense, "k*", ms=9, label="unpruned")
            axes.set(xlabel="measured latency, ms", ylabel={"agreement": "agreement, %", "top1": "top-1, %"}[key])
            axes.grid(alpha=0.3)
        panels[0].legend(frameon=False, fontsize=8)
        return {"compare.svg": _svg(figure, plt)}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    return plt


def _svg(figure: Any, plt: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
