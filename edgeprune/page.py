"""The page of a bundle: figures, charts and pictures in one HTML file that runs no script and loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from edgeprune import __version__
from edgeprune.bundle import PAGE, STAIRCASE, STORY, load_bundle, staircase_of
from edgeprune.charts import LEAST_KL, front_chart, staircase_chart, tokens_chart, trials_chart
from edgeprune.errors import InputError
from edgeprune.gallery import pictures
from edgeprune.records import (
    Engine,
    Latency,
    Preprocessing,
    Report,
    Schedule,
    Setup,
    Staircase,
    Story,
    Trial,
    load,
    sha256_bytes,
    write_bytes,
)
from edgeprune.schedule import pareto
from edgeprune.staircase import treads

CSS = Path(__file__).with_suffix(".css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # not even a script may run
Rows = Iterable[Sequence[str]]


def page_html(
    engine: Engine,
    schedule: Schedule,
    report: Report,
    preprocessing: Preprocessing,
    staircase: Staircase | None,
    story: Story,
) -> str:
    """The whole page. The same records give the same text, and every string in them is escaped."""
    setup, vit = engine.setup, schedule.vit
    where = f"{vit.name} on {setup.device}: {setup.runtime} {setup.runtime_version}, {setup.precision}"
    how = f"{schedule.method} ({schedule.policy})" + (f", asked for {story.asked}" if story.asked else "")
    mark = " SIMULATED." if setup.simulated else ""  # below every chart of latencies
    body = [
        f"<header><h1>{_gain(report, setup)}</h1>",
        f'<p class="sub">{escape(where)}, batch {setup.batch} · {escape(how)}</p></header>',
        _warning(setup),
        _tiles(report),
        '<div class="charts">',
        _staircase(staircase, schedule, mark),
        _tokens(schedule),
        _front(staircase, schedule, story, mark),
        _trials(schedule, report, story, mark),
        "</div>",
        pictures(schedule, story.samples),
        _figures(schedule, report),
        _setup(engine, schedule, report, preprocessing),
        _probes(staircase) if staircase else "",
        f"<footer>Drawn by edgeprune {__version__} from the records of the bundle. This page holds all it shows and "
        "loads nothing.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{escape(vit.name)} on {escape(setup.device)}: edgeprune</title>\n'
        f"<style>\n{CSS.read_text(encoding='utf-8')}</style></head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body></html>\n"
    )


def page_of_bundle(bundle: Path, out: Path | None = None) -> Path:
    """Draw the page of a bundle again from its records; where it is.

    A bundle is never changed: without `out` its own page is returned where that is what would be drawn. A page by
    another version of edgeprune is left alone and the new one written beside the bundle, as BUNDLE.html.
    Raises InputError, RecordError, OutputError.
    """
    manifest = load_bundle(bundle)
    if STORY not in manifest.files:
        raise InputError(f"{bundle}: {STORY} is missing: build the bundle again")
    text = page_html(
        manifest.engine,
        manifest.schedule,
        manifest.report,
        manifest.preprocessing,
        staircase_of(bundle) if STAIRCASE in manifest.files else None,
        load(bundle / STORY, Story),
    ).encode()
    if out is None:
        if manifest.files.get(PAGE) == sha256_bytes(text):
            return bundle / PAGE
        out = bundle.resolve().with_name(f"{bundle.resolve().name}.html")
    write_bytes(out, text)
    return out


def _gain(report: Report, setup: Setup) -> str:
    """What was gained and what it cost, in a line."""
    if report.speedup is None:
        gain = f"{report.latency.median_ms:.2f} ms"
    else:
        gain = f"{report.speedup:.2f}× {'faster' if report.speedup >= 1 else 'as fast'}"
    gain += " (SIMULATED)" if setup.simulated else ""
    if report.top1 is not None and report.dense_top1 is not None:
        points = round(report.dense_top1 - report.top1, 1)
        lost = f"{abs(points):.1f} points of top-1 {'lost' if points > 0 else 'gained'}"
        return f"{gain}, {lost}" if points else f"{gain}, no top-1 lost"
    if report.agreement is not None:
        return f"{gain}, {report.agreement:.1f} % of answers unchanged"
    return f"{gain}, " + ("accuracy not measured" if report.top1 is None else f"{report.top1:.1f} % top-1")


def _warning(setup: Setup) -> str:
    if not setup.simulated:
        return ""
    return (
        '<p class="simulated"><strong>SIMULATED</strong>: no hardware was measured. All latencies on this page come '
        f"from the tail-effect model of {escape(setup.device)}.</p>"
    )


def _tiles(report: Report) -> str:
    """What is known, in large figures."""
    before = f"{report.dense_latency.median_ms:.2f} → " if report.dense_latency else ""
    tiles = [(f"{before}{report.latency.median_ms:.2f} ms", "median latency of one inference")]
    if report.speedup is not None and report.speedup_interval is not None:
        low, high = report.speedup_interval
        tiles.append((f"{report.speedup:.2f}×", f"speed-up, 95 % interval {low:.2f} to {high:.2f}"))
    if report.top1 is not None:
        before = f"{report.dense_top1:.2f} → " if report.dense_top1 is not None else ""
        tiles.append((f"{before}{report.top1:.2f} %", f"top-1 on {report.images} pictures"))
    if report.agreement is not None and report.kl is not None:
        kl = f"{report.kl:.4f}" if report.kl >= 1e-4 else "below 0.0001"
        tiles.append((f"{report.agreement:.2f} %", "agreement with the unpruned model"))
        tiles.append((f"{kl} nats", "KL from the unpruned model"))
    cells = (f'<div class="tile"><b>{figure}</b><span>{what}</span></div>' for figure, what in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _section(title: str, content: str, caption: str) -> str:
    return f"<section><h2>{title}</h2><figure>{content}<figcaption>{caption}</figcaption></figure></section>"


def _key(kind: str, text: str) -> str:
    return f'<i class="key {kind}"></i> {text}'


def _staircase(staircase: Staircase | None, schedule: Schedule, mark: str) -> str:
    if staircase is None:
        return _section("Staircase", "", "This bundle holds none: pass --staircase to edgeprune compile.")
    keys = _key("tread-end", "right end of a tread, the most tokens for their latency"), _key("chosen", "chosen")
    caption = f"All blocks at one token count; grey: 95 % interval of the median. {', '.join(keys)}."
    return _section("Staircase", staircase_chart(staircase, schedule), caption + mark)


def _tokens(schedule: Schedule) -> str:
    caption = (
        f"{schedule.vit.tokens} tokens enter block 0, prefix included. {_key('cut', 'a block that loses some')}."
    )
    if schedule.prefix_last:
        caption += f" {_key('alone', 'computed for the prefix alone: lossless')}."
    return _section("Tokens per block", tokens_chart(schedule), caption)


def _front(staircase: Staircase | None, schedule: Schedule, story: Story, mark: str) -> str:
    if staircase is None or not story.candidates:
        return _section("Pareto front", "", "No schedules were weighed for this bundle.")
    front = pareto(story.candidates)
    others = [c for c in story.candidates if c not in front]
    keys = _key("tread-end", "on the front"), _key("probe", "beaten"), _key("chosen", "chosen")
    caption = f"{len(story.candidates)} schedules weighed on the search pictures. {', '.join(keys)}."
    if any(c.kl <= LEAST_KL for c in story.candidates):
        caption += f" On the lowest line KL is {LEAST_KL:.5f} nats or less."
    return _section("Pareto front", front_chart(front, others, schedule, staircase.dense.median_ms), caption + mark)


def _trials(schedule: Schedule, report: Report, story: Story, mark: str) -> str:
    title, trials = "Predicted against measured", story.trials
    if not trials and report.predicted_ms is not None:
        trials = (Trial(tokens=schedule.tokens, predicted_ms=report.predicted_ms, latency=report.latency),)
    if not trials:
        return _section(title, "", "Nothing was predicted: that needs a staircase.")
    keys = _key("predicted", "predicted"), _key("chosen", "measured, with its 95 % interval")
    caption = f"Schedules that were built, in order. {', '.join(keys)}. The axis does not begin at zero."
    return _section(title, trials_chart(trials, schedule), caption + mark)


def _figures(schedule: Schedule, report: Report) -> str:
    vit, dense, pruned = schedule.vit, report.dense_latency, report.latency
    speedup = number(report.speedup, 3)
    if report.speedup_interval is not None:
        speedup += " ({:.3f} to {:.3f})".format(*report.speedup_interval)
    rows = [
        ("tokens per block", f"{vit.tokens} × {vit.depth}", ", ".join(map(str, schedule.tokens))),
        ("latency, median, ms", number(dense.median_ms if dense else None, 3), f"{pruned.median_ms:.3f}"),
        ("95 % interval, ms", _interval(dense), _interval(pruned)),
        ("99th percentile, ms", number(dense.p99_ms if dense else None, 3), f"{pruned.p99_ms:.3f}"),
        ("predicted, ms", "", number(report.predicted_ms, 3)),
        ("speed-up (95 % interval)", "1", speedup),
        ("top-1, %", number(report.dense_top1), number(report.top1)),
        ("agreement, %", "100", number(report.agreement)),
        ("KL, nats", "0", number(report.kl, 4)),
    ]
    if report.fused_attention is not None:
        rows.append(("fused attention, layers", "", f"{report.fused_attention} of {report.fusable_attention}"))
    head = ("", "unpruned", f"{escape(schedule.method)} ({escape(schedule.policy)})")
    return f"<section><h2>Figures</h2>{_table(rows, head)}</section>"


def _setup(engine: Engine, schedule: Schedule, report: Report, preprocessing: Preprocessing) -> str:
    setup, how = engine.setup, preprocessing
    together = ", interleaved with the unpruned model" if report.dense_latency else ""
    values = {
        "machine": setup.machine,
        "runtime": f"{setup.runtime} {setup.runtime_version}" + (", SIMULATED" if setup.simulated else ""),
        "precision, batch": f"{setup.precision}, {setup.batch}",
        "threads": setup.threads,
        "power mode": setup.power_mode,
        "builder options": setup.options,
        "rounds": f"{len(report.latency.samples_ms)}{together}",
        "probes": report.probes or None,
        "accuracy on": f"{report.images} pictures" if report.images else None,
        "preprocessing": f"{how.resize_px} px {how.interpolation}, {how.crop_mode} crop of {how.image_px} px",
        "engine": f"{engine.path}, {engine.size_bytes / 1e6:.1f} MB, sha256 {engine.sha256[:12]}…",
        "weights": f"sha256 {schedule.vit.weights_sha256[:12]}…",
    }
    rows = [(name, escape(str(value))) for name, value in values.items() if value is not None]
    return f'<section class="plain"><h2>Setup</h2>{_table(rows)}</section>'


def _probes(staircase: Staircase) -> str:
    ends = treads(staircase)
    rows = [
        (f"{p.tokens}", f"{p.latency.median_ms:.3f}", _interval(p.latency), "tread" if p.tokens in ends else "")
        for p in reversed(staircase.points)
    ]
    table = _table(rows, ("tokens", "median, ms", "95 % interval, ms", ""))
    return (
        f'<section class="long"><details><summary>Every probe of the staircase</summary>{table}</details></section>'
    )


def _table(rows: Rows, head: Sequence[str] = ()) -> str:
    """Cells of HTML; the first of a row names it."""
    top = "<thead><tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr></thead>" if head else ""
    lines = (
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
        for name, *cells in rows
    )
    return f"<table>{top}<tbody>{''.join(lines)}</tbody></table>"


def _interval(latency: Latency | None) -> str:
    if latency is None:
        return "–"
    low, high = latency.interval_ms
    return f"{low:.3f} to {high:.3f}"


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; a dash where it is unknown."""
    return "–" if value is None else f"{value:.{digits}f}"
