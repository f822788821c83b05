"""A bench for a person: as a table, and as Markdown for the summary of a CI job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeprune.benchmark.baseline import drift

if TYPE_CHECKING:
    from rich.table import Table

TITLE = "bundles, measured interleaved"


def bench_table(result: Mapping[str, Any]) -> Table:
    """Bundles with what was measured of them; columns of which nothing is known are left out."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=TITLE)
    head, *lines = _cells(result)
    for column in head:
        table.add_column(column, justify="left" if column == "bundle" else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def bench_markdown(result: Mapping[str, Any], failed: str | None) -> str:
    """The same table in GitHub's Markdown, under a line for each setup; `failed` says why the bench does."""
    known = [{k: v for k, v in row["setup"].items() if v is not None and v is not False} for row in result["rows"]]
    setups = [", ".join(f"{k} {v}" for k, v in setup.items()) for setup in known]
    head, *lines = _cells(result)
    text = [f"### {TITLE}", ""]
    text += [f"- {escaped(setup)}" for setup in dict.fromkeys(setups)]
    text += ["", _line(head), _line("---" if column == "bundle" else "---:" for column in head)]
    text += [_line(map(escaped, line)) for line in lines]
    text += [f"\n**{escaped(failed)}**"] if failed else []
    text += [f"\nWarning: {escaped(changed)}"] if (changed := drift(result["probes"])) else []
    return "\n".join(text) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: names of folders come from outside."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#~&" else letter for letter in " ".join(text.split()))


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(result: Mapping[str, Any]) -> list[list[str]]:
    """Head and one line per bundle."""
    rows = [_named(row) for row in result["rows"]]
    shown = [column for column in rows[0] if any(row[column] is not None for row in rows)]
    return [shown, *([row[column] or "–" for column in shown] for row in rows)]


def _named(row: Mapping[str, Any]) -> dict[str, str | None]:
    """The cells of one bundle by column; None where the figure is unknown."""
    ms, share = row["latency_ms"], row["peak_share"]
    peak = "" if share is None else f" ({100 * share:.1f} %)"
    return {
        "bundle": row["bundle"] + (" (SIMULATED)" if row["simulated"] else ""),
        "median, ms (95 %)": f"{ms['median']:.3f} ({ms['low']:.3f} to {ms['high']:.3f})",
        "p90": f"{ms['p90']:.3f}",
        "p99": f"{ms['p99']:.3f}",
        "speed-up to the first": _ratio(row, "speedup_to_first", "speedup_interval"),
        "to baseline": _ratio(row, "baseline_ratio", "baseline_interval"),
        "images/s": f"{row['images_per_s']:.1f}",
        "GFLOP/s (of peak)": None if row["gflop_per_s"] is None else f"{row['gflop_per_s']:.1f}{peak}",
        "memory, MiB": _number(row["peak_memory_mib"]),
        "mJ/image": _number(row["energy_per_image_mj"]),
    }


def _ratio(row: Mapping[str, Any], value: str, interval: str) -> str | None:
    if value not in row:
        return None
    low, high = row[interval]
    return f"{row[value]:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
