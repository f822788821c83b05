"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeprune.html_report.figures import (
    UNKNOWN,
    evaluated_on,
    fidelity_rows,
    interval,
    number,
    recovered_how,
    unrecovered_figures,
)
from edgeprune.latency.probing import confirmed_edges
from edgeprune.records import Latency, Manifest, PrecisionResult, Setup, Staircase

if TYPE_CHECKING:
    from rich.table import Table

    from edgeprune.bundles.predict import Predictions
    from edgeprune.bundles.ship import Shipped
    from edgeprune.bundles.verify import Check
    from edgeprune.sweeps.plan import Job


def build_table(manifest: Manifest) -> Table:
    """Unpruned and pruned model side by side."""
    from rich.table import Table

    setup, schedule, report = manifest.engine.setup, manifest.schedule, manifest.report
    simulated = ", SIMULATED latency" if setup.simulated else ""
    table = Table(
        title=f"{manifest.vit.name} on {setup.device} ({setup.runtime} {setup.runtime_version}, "
        f"{setup.precision}, batch {setup.batch}{simulated})"
    )
    table.add_column("")
    before = report.unrecovered
    for column in ("unpruned", *(["without recovery"] if before else []), f"{schedule.method} ({schedule.policy})"):
        table.add_column(column, justify="right")
    unrecovered = unrecovered_figures(before) if before else None
    for name, dense, pruned in _build_rows(manifest):
        table.add_row(name, dense, *([unrecovered.get(name, "")] if unrecovered else []), pruned)
    rounds = f"interleaved rounds: {len(report.latency.samples_ms)}"
    table.caption = f"{evaluated_on(report.images, report.held_out)}; {rounds}" if report.images else rounds
    if manifest.recovery is not None:
        table.caption += f"; {recovered_how(manifest.recovery)}"
    return table


def _build_rows(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Names, and figures of the unpruned and of the pruned model."""
    schedule, report = manifest.schedule, manifest.report
    rows = [
        ("tokens per block", f"{manifest.vit.tokens} x {manifest.vit.depth}", runs(schedule.tokens)),
        ("latency, ms (95 % interval)", _ms(report.dense_latency), _ms(report.latency)),
    ]
    if report.speedup is not None and report.speedup_interval is not None:
        low, high = report.speedup_interval
        rows.append(("speed-up (95 % interval)", "1", f"{report.speedup:.3f} ({low:.3f} to {high:.3f})"))
    if report.predicted_ms is not None:
        off = 100 * (report.predicted_ms / report.latency.median_ms - 1)
        rows.append(("predicted, ms", "", f"{report.predicted_ms:.3f} ({off:+.1f} %)"))
    rows += fidelity_rows(report)
    if report.fused_attention is not None:
        rows.append(("fused attention, layers", "", f"{report.fused_attention} of {report.fusable_attention}"))
    return rows


def precision_table(results: Sequence[PrecisionResult], setup: Setup) -> Table:
    """What `--precision auto` tried, and why all but one were not kept."""
    from rich.table import Table

    table = Table(title="precisions" + (", SIMULATED latency" if setup.simulated else ""))
    embeds, dense = any(r.cosine is not None for r in results), any(r.error is not None for r in results)
    figures = ("k-NN top-1, %", "neighbour, %", "cosine") if embeds else ("top-1, %", "agreement, %", "KL, nats")
    figures = ("", "", "relative error") if dense else figures
    for column in ("precision", "latency, ms (95 % interval)", *figures):
        table.add_column(column, justify="left" if column == "precision" else "right")
    table.add_column("", overflow="fold")
    for result in results:
        loss = result.error if dense else result.cosine if embeds else result.kl
        figures = (number(result.top1), number(result.agreement), number(loss, 4))
        figures = ("", "", figures[2]) if dense else figures
        verdict = "kept" if result.precision == setup.precision else result.reason or ""
        table.add_row(result.precision, _ms(result.latency), *figures, verdict)
    if setup.simulated:
        table.caption = "a simulation computes outputs in fp32: precisions do not change its accuracy figures"
    return table


def runs(tokens: tuple[int, ...]) -> str:
    """Tokens per block in short: (197, 197, 120) as "197 x 2, 120"."""
    parts: list[list[int]] = []
    for count in tokens:
        if parts and parts[-1][0] == count:
            parts[-1][1] += 1
        else:
            parts.append([count, 1])
    return ", ".join(f"{n} x {times}" if times > 1 else str(n) for n, times in parts)


def _ms(latency: Latency | None) -> str:
    return UNKNOWN if latency is None else f"{latency.median_ms:.3f} ({interval(latency)})"


def profile_table(staircase: Staircase) -> Table:
    """The treads of a staircase with their latency."""
    from rich.table import Table

    simulated = " (simulated)" if staircase.setup.simulated else ""
    table = Table(title=f"{staircase.vit.name} on {staircase.setup.device}{simulated}: treads")
    for column in ("tokens", "trunk, ms (95 % interval)", "of unpruned"):
        table.add_column(column, justify="right")
    ends = set(confirmed_edges(staircase))
    most = staircase.points[-1].latency.median_ms
    for point in reversed(staircase.points):
        if point.tokens in ends:
            table.add_row(str(point.tokens), _ms(point.latency), f"{point.latency.median_ms / most:.3f}")
    throttled = "; CLOCKS WERE LOWERED WHILE IT WAS MEASURED" if staircase.throttled else ""
    table.caption = f"{len(staircase.points)} counts, {staircase.probes} probes{throttled}"
    return table


def run_table(found: Predictions) -> Table:
    """Images with their likeliest classes, or the lengths of their embeddings, and files that were saved."""
    from rich.table import Table

    simulated = ", SIMULATED latency" if found.setup.simulated else ""
    table = Table(title=f"{found.model} on {found.setup.device} ({found.setup.runtime}{simulated})")
    table.add_column("image", overflow="fold")
    table.add_column("likeliest classes, %" if found.task == "classify" else "norm of the embedding")
    if any(row.file for row in found.rows):
        table.add_column("saved as", overflow="fold")
    for row in found.rows:
        classes = "; ".join(f"{c.label} {c.percent:.1f}" for c in row.top)
        saved = [str(row.file)] if row.file else []
        table.add_row(str(row.image), classes if row.embedding is None else f"{row.norm:.4g}", *saved)
    table.caption = f"{_ms(found.latency)} ms for a batch of {found.setup.batch}"
    return table


def verify_table(bundle: str, checks: Sequence[Check]) -> Table:
    """The checks of a bundle: expected, found, and what to do."""
    from rich.table import Table

    table = Table(title=bundle)
    for column in ("check", "", "expected", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, check.status, check.expected, check.found, check.advice)
    return table


def ship_table(results: Sequence[Shipped]) -> Table:
    """Destinations with their results."""
    from rich.table import Table

    table = Table(title="shipped")
    timed = any(result.latency_ms for result in results)
    right = ("MB sent", "latency, ms")
    for column in ("to", "state", *right[: 1 + timed], "version, or what failed"):
        table.add_column(column, overflow="fold", justify="right" if column in right else "left")
    for result in results:
        figures = [f"{result.sent_bytes / 1e6:.1f}"]
        if timed:
            figures.append(f"{result.latency_ms['median']:.3f}" if result.latency_ms else "")
        table.add_row(result.to, result.state + (" (canary)" if result.canary else ""), *figures, result.detail)
    return table


def device_table(rows: list[dict[str, Any]]) -> Table:
    """Devices, one per line."""
    from rich.table import Table

    table = Table(title="devices")
    for column in ("name", "description", "runtime", "SMs", "GiB", "TensorRT", "JetPack", "--simulate"):
        table.add_column(column)
    for row in rows:
        runtime = row["runtime"] if row["build"] else "planning only"
        cells = (row[key] for key in ("sm_count", "memory_gib", "tensorrt", "jetpack"))
        shown = (UNKNOWN if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells)
        table.add_row(row["name"], row["title"], runtime, *shown, "yes" if row["simulation"] else UNKNOWN)
    return table


def doctor_table(findings: list[Any]) -> Table:
    """Findings of the doctor."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "info": "dim", "warning": "yellow"}
    table = Table(title="edgeprune doctor")
    for column in ("", "status", "finding"):
        table.add_column(column, overflow="fold")
    for name, status, detail in findings:
        table.add_row(name, Text(status, colours[status]), detail)
    return table


def compare_table(rows: list[dict[str, Any]]) -> Table:
    """Entries of a comparison by target speed-up, the lowest loss (KL, 1 - cosine, or error) first."""
    from rich.table import Table

    first = rows[0] if rows else {}
    figures, keys, sign = _compared(rows)
    rows = [row | _fidelity_of(row) for row in rows]
    simulated = ", SIMULATED latency" if first.get("simulated") else ""
    unpruned = f": unpruned {figures[0]} {number(first.get('dense_top1'))} %" if keys[0] == "top1" else ""
    table = Table(
        title=f"{first.get('model')} on {first.get('device')}{simulated}{unpruned}",
        caption=evaluated_on(first.get("images", 0), first.get("held_out")),
    )
    for column in ("target", "method", "shape", "speed-up (95 %)", "predicted", *figures, "tokens"):
        table.add_column(column, justify="left" if column in ("method", "shape", "tokens") else "right")
    for row in sorted(rows, key=lambda r: (r["target"], sign * r[keys[-1]])):
        low, high = row["speedup_interval"]
        table.add_row(
            f"{row['target']:g}x",
            row["method"],
            row["policy"],
            f"{row['speedup']:.2f} ({low:.2f}–{high:.2f})",
            f"{row['dense_latency_ms']['median'] / row['predicted_ms']:.2f}",
            *(_both(row, key) for key in keys[:-1]),
            _both(row, keys[-1], 4),
            runs(tuple(row["tokens"])),
        )
    return table


def _compared(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Names and keys of the figures that are compared, the loss last, and whether more of that is better (-1)."""
    task = rows[0]["fidelity"]["task"] if rows else "classify"
    if task == "dense":
        return ("embedding cosine", "relative error"), ("embedding_cosine", "error"), 1
    if task == "embed":
        return ("k-NN top-1", "neighbour", "cosine"), ("top1", "agreement", "cosine"), -1
    return ("top-1", "agreement", "KL"), ("top1", "agreement", "kl"), 1


def _fidelity_of(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row that are in its fidelity alone."""
    return {key: row["fidelity"].get(key) for key in ("cosine", "embedding_cosine", "error")}


def _both(row: dict[str, Any], figure: str, digits: int = 2) -> str:
    """A figure of a comparison, after the one without recovery if weights were recovered."""
    before = row["unrecovered"]
    if before and before["features"]:
        before = before["features"]
    return (number(before.get(figure), digits) + " → " if before else "") + number(row[figure], digits)


def sweep_table(rows: list[dict[str, Any]]) -> Table:
    """Builds of a sweep; what made one fail is in its row and on the page."""
    from rich.table import Table

    simulated = ", some with SIMULATED latency" if any(row.get("simulated") for row in rows) else ""
    table = Table(title=f"{len(rows)} builds{simulated}")
    dense = any((row.get("fidelity") or {}).get("task") == "dense" for row in rows)
    figures = ("latency, ms", "speed-up", "top-1", "agreement", *(["error"] if dense else []))
    for column in ("model", "device", "method", "goal", *figures, ""):
        table.add_column(column, justify="right" if column in figures else "left", overflow="fold")
    for row in rows:
        device = f"{row['device']}, {row['precision']}, batch {row['batch']}" + (
            ", simulated" if row.get("simulated") else ""
        )
        ms = row["latency_ms"]["median"] if row["latency_ms"] else None
        cells = [number(ms, 3), number(row["speedup"]), number(row["top1"]), number(row["agreement"])]
        cells += [number((row.get("fidelity") or {}).get("error"), 4)] if dense else []
        table.add_row(row["label"], device, row["method"], row["goal"], *cells, "failed" if row["error"] else "")
    return table


def plan_table(boards: Mapping[str, Sequence[Job]], finished: Collection[str]) -> Table:
    """The builds of a sweep by board, before they are run."""
    from rich.table import Table

    table = Table(title="plan")
    for column in ("board", "build", "goal", ""):
        table.add_column(column, overflow="fold")
    for board, jobs in boards.items():
        for job in jobs:
            table.add_row(board, job.name, str(job.goal), "has a result" if job.name in finished else "")
    return table
