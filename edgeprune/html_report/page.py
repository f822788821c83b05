"""The report page of a bundle: figures, charts and pictures in one HTML file without scripts or external files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from edgeprune.bundles.format import PAGE, STAIRCASE, TRACE, load_bundle, staircase_of
from edgeprune.errors import InputError
from edgeprune.html_report.charts import (
    LEAST_LOSS,
    front_chart,
    recovery_chart,
    staircase_chart,
    tokens_chart,
    trials_chart,
)
from edgeprune.html_report.figures import (
    UNKNOWN,
    evaluated_on,
    fidelity_rows,
    interval,
    number,
    recovered_how,
    unrecovered_figures,
)
from edgeprune.html_report.gallery import pictures
from edgeprune.io import load, sha256_bytes, write_bytes
from edgeprune.latency.staircase import treads
from edgeprune.records import (
    BuildTrace,
    DenseFidelity,
    EmbedFidelity,
    Engine,
    Preprocessing,
    Recovery,
    Report,
    Schedule,
    Setup,
    Staircase,
    Trial,
    text_of,
)
from edgeprune.scheduling.goals import pareto
from edgeprune.tasks import BY_NAME, Task
from edgeprune.version import __version__

HERE = Path(__file__).parent
Rows = list[tuple[str, ...]]  # cells of a table; the first cell of a row is its heading


def page_html(
    engine: Engine,
    schedule: Schedule,
    report: Report,
    preprocessing: Preprocessing,
    staircase: Staircase | None,
    trace: BuildTrace,
    recovery: Recovery | None = None,
    task: str = "classify",
) -> str:
    """The HTML text. The same records give the same text; the template escapes every string in them."""
    return template_named("template.html.j2").render(
        version=__version__,
        css=Markup("".join((HERE / name).read_text(encoding="utf-8") for name in ("chart.css", "page.css"))),
        setup=engine.setup,
        schedule=schedule,
        goal=trace.asked,
        summary=_summary(report, engine.setup, BY_NAME[task]),
        tiles=_tiles(report, BY_NAME[task]),
        loss_name=BY_NAME[task].loss_name,
        loss_unit=BY_NAME[task].loss_unit,
        staircase=staircase and Markup(staircase_chart(staircase, schedule)),
        tokens=Markup(tokens_chart(schedule)),
        front=staircase and _front(staircase, schedule, trace, BY_NAME[task]),
        candidates=len(trace.candidates),
        least_loss=f"{LEAST_LOSS:.5f}" if any(c.loss <= LEAST_LOSS for c in trace.candidates) else None,
        trials=_trials(schedule, report, trace),
        recovery=recovery and Markup(recovery_chart(recovery)),
        recovery_note=recovery and recovered_how(recovery),
        pictures=pictures(schedule, trace.samples),
        figures=_figures(schedule, report),
        before_recovery=["without recovery"] if report.unrecovered else [],
        setup_rows=_setup(engine, schedule, report, preprocessing),
        points=_points(staircase) if staircase else [],
    )


def page_of_bundle(bundle: Path, out: Path | None = None) -> Path:
    """Draw the page of a bundle again from its records; returns the path of the page.

    A bundle is never changed: without `out`, its own page is returned if it equals the new one. Otherwise, for
    example after a build with another version of edgeprune, the new page is written next to the bundle as
    BUNDLE.html. Raises InputError, RecordError, OutputError.
    """
    manifest = load_bundle(bundle)
    if TRACE not in manifest.files:
        raise InputError(f"{bundle}: {TRACE} is missing: build the bundle again")
    text = page_html(
        manifest.engine,
        manifest.schedule,
        manifest.report,
        manifest.preprocessing,
        staircase_of(bundle) if STAIRCASE in manifest.files else None,
        load(bundle / TRACE, BuildTrace),
        manifest.recovery,
        manifest.task,
    ).encode()
    if out is None:
        if manifest.files.get(PAGE) == sha256_bytes(text):
            return bundle / PAGE
        out = bundle.resolve().with_name(f"{bundle.resolve().name}.html")
    write_bytes(out, text)
    return out


@cache
def template_named(name: str) -> Template:
    """A template of this folder: strings are escaped, and an unknown name in it is an error."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _summary(report: Report, setup: Setup, task: Task) -> str:
    """The speed-up and the loss of accuracy, in one line."""
    if report.speedup is None:
        gain = f"{report.latency.median_ms:.2f} ms"
    else:
        gain = f"{report.speedup:.2f}× {'faster' if report.speedup >= 1 else 'as fast'}"
    gain += " (SIMULATED)" if setup.simulated else ""
    if report.top1 is not None and report.dense_top1 is not None:
        points = report.dense_top1 - report.top1
        size = f"{abs(points):.1f}" if round(abs(points), 1) else "less than 0.1"
        lost = f"{size} points of {task.top1_name} {'lost' if points > 0 else 'gained'}"
        return f"{gain}, {lost}" if points else f"{gain}, no {task.top1_name} lost"
    if isinstance(report.fidelity, EmbedFidelity) and report.fidelity.cosine is not None:
        return f"{gain}, embeddings at a cosine of {report.fidelity.cosine:.4f}"
    if isinstance(report.fidelity, DenseFidelity) and report.fidelity.error is not None:
        what = "features" if report.fidelity.head_error is None else "head's output"
        return f"{gain}, {what} {100 * report.fidelity.error:.1f} % off"
    if report.agreement is not None:
        return f"{gain}, {report.agreement:.1f} % of answers unchanged"
    return f"{gain}, " + ("accuracy not measured" if report.top1 is None else f"{report.top1:.1f} % {task.top1_name}")


def _tiles(report: Report, task: Task) -> list[tuple[str, str]]:
    """The main figures with their captions; unknown figures are left out."""
    before = f"{report.dense_latency.median_ms:.2f} → " if report.dense_latency else ""
    tiles = [(f"{before}{report.latency.median_ms:.2f} ms", "median latency of one inference")]
    if report.speedup is not None and report.speedup_interval is not None:
        low, high = report.speedup_interval
        tiles.append((f"{report.speedup:.2f}×", f"speed-up, 95 % interval {low:.2f} to {high:.2f}"))
    evaluated = evaluated_on(report.images, report.held_out)
    if report.top1 is not None:
        before = f"{report.dense_top1:.2f} → " if report.dense_top1 is not None else ""
        tiles.append((f"{before}{report.top1:.2f} %", f"{task.top1_name} on {evaluated}"))
    found = report.fidelity
    if isinstance(found, EmbedFidelity) and found.cosine is not None:
        tiles.append((f"{found.cosine:.4f}", f"mean cosine to the unpruned embedding, on {evaluated}"))
        tiles.append((f"{found.neighbour_agreement:.2f} %", "of pictures with the same nearest neighbour"))
    if isinstance(found, DenseFidelity) and found.error is not None and found.embedding_cosine is not None:
        what = "features of the layers" if found.head_error is None else "output of the head"
        tiles.append((f"{100 * found.error:.2f} %", f"relative error of the {what}, on {evaluated}"))
        tiles.append((f"{found.embedding_cosine:.4f}", "mean cosine to the unpruned embedding"))
    if report.agreement is not None and report.kl is not None:
        kl = f"{report.kl:.4f}" if report.kl >= 1e-4 else "below 0.0001"
        where = f", on {evaluated}" if report.top1 is None else ""
        tiles.append((f"{report.agreement:.2f} %", f"agreement with the unpruned model{where}"))
        tiles.append((f"{kl} nats", "KL from the unpruned model"))
    return tiles


def _front(staircase: Staircase, schedule: Schedule, trace: BuildTrace, task: Task) -> Markup | None:
    """The chart of the schedules that the search evaluated; None without a search."""
    if not trace.candidates:
        return None
    front = pareto(trace.candidates)
    others = [c for c in trace.candidates if c not in front]
    return Markup(front_chart(front, others, schedule, staircase.dense.median_ms, task))


def _trials(schedule: Schedule, report: Report, trace: BuildTrace) -> Markup | None:
    """The chart of predicted and measured latencies; None without a prediction."""
    trials = trace.trials
    if not trials and report.predicted_ms is not None:
        trials = (Trial(tokens=schedule.tokens, predicted_ms=report.predicted_ms, latency=report.latency),)
    return Markup(trials_chart(trials, schedule)) if trials else None


def _figures(schedule: Schedule, report: Report) -> Rows:
    vit, dense, pruned = schedule.vit, report.dense_latency, report.latency
    speedup = number(report.speedup, 3)
    if report.speedup_interval is not None:
        speedup += " ({:.3f} to {:.3f})".format(*report.speedup_interval)
    rows: Rows = [
        ("tokens per block", f"{vit.tokens} × {vit.depth}", ", ".join(map(str, schedule.tokens))),
        ("latency, median, ms", number(dense.median_ms if dense else None, 3), f"{pruned.median_ms:.3f}"),
        ("95 % interval, ms", interval(dense), interval(pruned)),
        ("99th percentile, ms", number(dense.p99_ms if dense else None, 3), f"{pruned.p99_ms:.3f}"),
        ("predicted, ms", "", number(report.predicted_ms, 3)),
        ("speed-up (95 % interval)", UNKNOWN if report.speedup is None else "1", speedup),
        *fidelity_rows(report),
    ]
    if report.fused_attention is not None:
        rows.append(("fused attention, layers", "", f"{report.fused_attention} of {report.fusable_attention}"))
    before = report.unrecovered
    if before is None:
        return rows
    figures = unrecovered_figures(before)
    return [(name, dense, figures.get(name, ""), pruned) for name, dense, pruned in rows]


def _setup(engine: Engine, schedule: Schedule, report: Report, preprocessing: Preprocessing) -> Rows:
    setup, how = engine.setup, preprocessing
    together = ", interleaved with the unpruned model" if report.dense_latency else ""
    values: dict[str, Any] = {
        "machine": setup.machine,
        "runtime": f"{setup.runtime} {setup.runtime_version}" + (", SIMULATED" if setup.simulated else ""),
        "precision, batch": f"{setup.precision}, {setup.batch}",
        "threads": setup.threads,
        "power mode": setup.power_mode,
        "builder options": setup.options,
        "rounds": f"{len(report.latency.samples_ms)}{together}",
        "probes": f"{report.probes} latency measurements" if report.probes else None,
        "accuracy on": evaluated_on(report.images, report.held_out) if report.images else None,
        "preprocessing": f"{text_of(how.resize_px)} px {how.interpolation}, "
        f"{how.crop_mode} crop of {text_of(how.image_px)} px",
        "engine": f"{engine.path}, {engine.size_bytes / 1e6:.1f} MB, sha256 {engine.sha256[:12]}…",
        "weights": f"sha256 {schedule.vit.weights_sha256[:12]}…",
    }
    return [(name, str(value)) for name, value in values.items() if value is not None]


def _points(staircase: Staircase) -> Rows:
    """One row per measured token count, largest first."""
    ends = treads(staircase)
    return [
        (str(p.tokens), f"{p.latency.median_ms:.3f}", interval(p.latency), "tread" if p.tokens in ends else "")
        for p in reversed(staircase.points)
    ]
