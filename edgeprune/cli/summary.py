"""A bench as a table for the terminal, and as Markdown for the summary of a CI job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from edgeprune.benchmark.baseline import drift
from edgeprune.benchmark.result import Bench, BenchRow, Ratio

if TYPE_CHECKING:
    from rich.table import Table

TITLE = "bundles, measured interleaved"
ENDS = ", wall time with the copies to and from the device"


def bench_table(bench: Bench) -> Table:
    """One line per bundle; columns without any known figure are left out."""
    from rich.table import Table

    table = Table(title=TITLE + (ENDS if bench.end_to_end else ""))
    head, *lines = _cells(bench)
    for column in head:
        table.add_column(column, justify="left" if column == "bundle" else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def bench_markdown(bench: Bench, failed: str | None) -> str:
    """The same table in GitHub's Markdown, under a line for each setup; `failed` is the reason of a failure."""
    fields = [msgspec.structs.asdict(row.setup).items() for row in bench.rows]
    setups = [", ".join(f"{k} {v}" for k, v in known if v is not None and v is not False) for known in fields]
    head, *lines = _cells(bench)
    text = [f"### {TITLE}{ENDS if bench.end_to_end else ''}", ""]
    text += [f"- {escaped(setup)}" for setup in dict.fromkeys(setups)]
    text += ["", _line(head), _line("---" if column == "bundle" else "---:" for column in head)]
    text += [_line(map(escaped, line)) for line in lines]
    text += [f"\n**{escaped(failed)}**"] if failed else []
    text += [f"\nWarning: {escaped(changed)}"] if (changed := drift(bench.peaks)) else []
    return "\n".join(text) + "\n"


def escaped(text: str) -> str:
    """Text with the characters escaped that Markdown interprets: names of folders can be anything."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#~&" else letter for letter in " ".join(text.split()))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(bench: Bench) -> list[list[str]]:
    """Head and one line per bundle."""
    rows = [_named(row) for row in bench.rows]
    shown = [column for column in rows[0] if any(row[column] is not None for row in rows)]
    return [shown, *([row[column] or "–" for column in shown] for row in rows)]


def _named(row: BenchRow) -> dict[str, str | None]:
    """The cells of one bundle by column; None where the figure is unknown."""
    low, high = row.latency.interval_ms
    peak = "" if row.peak_share is None else f" ({100 * row.peak_share:.1f} %)"
    return {
        "bundle": row.bundle + (" (SIMULATED)" if row.setup.simulated else ""),
        "median, ms (95 %)": f"{row.latency.median_ms:.3f} ({low:.3f} to {high:.3f})",
        "p90": f"{row.p90_ms:.3f}",
        "p99": f"{row.latency.p99_ms:.3f}",
        "speed-up to the first": _ratio(row.speedup),
        "to baseline": _ratio(row.to_baseline),
        "images/s": f"{row.images_per_s:.1f}",
        "GFLOP/s (of peak)": None if row.gflop_per_s is None else f"{row.gflop_per_s:.1f}{peak}",
        "memory, MiB": _number(row.peak_memory_mib),
        "mJ/image": _number(row.energy_per_image_mj),
    }


def _ratio(ratio: Ratio | None) -> str | None:
    if ratio is None:
        return None
    value, (low, high) = ratio
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
