"""Charts as SVG of a few kilobytes each; chart.css gives their classes colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from math import ceil, cos, floor, log10, pi, sin
from typing import NamedTuple

from edgeprune.latency.staircase import treads, trunk_ms
from edgeprune.records import Candidate, Latency, Recovery, Schedule, Staircase, Trial
from edgeprune.tasks import BY_NAME, Task

WIDTH, HEIGHT = 440, 280  # user units; text of size 12 is readable on a phone and not too large on a desktop
LEFT, RIGHT, TOP, BOTTOM = 40, 18, 30, 40
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LEAST_LOSS = (
    1e-5  # KL in nats, 1 - cosine or squared error, about the rounding error of zero; smaller values are drawn here
)


class Axis(NamedTuple):
    """Maps values from `low` to `high` to positions from `start` to `end`, user units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Round values within the axis, and their text; powers of ten on a logarithmic axis."""
        if self.log:
            exponents = range(ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9) + 1)
            return [(10.0**k, f"10{str(k).translate(SUPERSCRIPT)}") for k in exponents]
        rough = (self.high - self.low) / most
        power = 10.0 ** floor(log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
        places = range(ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9) + 1)
        return [(step * k, f"{step * k:g}") for k in places]


def across(low: float, high: float) -> Axis:
    """A horizontal axis over the width of a chart, widened if `low` equals `high`."""
    room = 0 if high > low else 0.05 * abs(high) or 1
    return Axis(low - room, high + room, LEFT, WIDTH - RIGHT)


class Drawing:
    """Parts of an SVG, in the order in which they are drawn; x, y and sizes in user units."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    @property
    def body(self) -> str:
        """All parts, without the `svg` around them."""
        return "".join(self.parts)

    def text(self, text: str, x: float, y: float, anchor: str = "middle", kind: str = "tick") -> None:
        """A line of text with its baseline at (x, y)."""
        self.parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A path through points."""
        self.parts.append(f'<path class="{kind}" d="M{_places(points)}"/>')

    def dot(self, x: float, y: float, kind: str, tooltip: str, radius: float = 3) -> None:
        """A circle with a tooltip."""
        title = f"<title>{escape(tooltip)}</title>"
        self.parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>')

    def star(self, x: float, y: float, kind: str, tooltip: str, radius: float = 8) -> None:
        """A star of five points with a tooltip."""
        turns = ((-pi / 2 + k * pi / 5, radius * (0.4 if k % 2 else 1)) for k in range(10))
        outline = _places([(x + length * cos(turn), y + length * sin(turn)) for turn, length in turns])
        self.parts.append(f'<path class="{kind}" d="M{outline}z"><title>{escape(tooltip)}</title></path>')

    def bar(self, x: float, y: float, width: float, height: float, kind: str, tooltip: str) -> None:
        """A rectangle with a tooltip."""
        box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect class="{kind}" {box}><title>{escape(tooltip)}</title></rect>')


class Chart(Drawing):
    """One SVG: grid and axes first, then everything that is added, in order."""

    def __init__(
        self, name: str, x: Axis, y: Axis, labels: tuple[str, str], height: float = HEIGHT, numbered: str = "xy"
    ) -> None:
        super().__init__()
        self.name, self.x, self.y, self.height = name, x, y, height
        bottom = height - BOTTOM
        for tick, text in x.ticks() if "x" in numbered else ():
            self.text(text, x(tick), bottom + 16)
        for tick, text in y.ticks() if "y" in numbered else ():
            self.line([(LEFT, y(tick)), (WIDTH - RIGHT, y(tick))], "grid")
            self.text(text, LEFT - 6, y(tick) + 4, "end")
        self.line([(LEFT, bottom), (WIDTH - RIGHT, bottom)], "axis")
        self.text(labels[0], WIDTH - RIGHT, height - 6, "end", "label")
        if labels[1]:
            self.text(labels[1], 0, 12, "start", "label")

    def __str__(self) -> str:
        box = f'viewBox="0 0 {WIDTH} {self.height:g}"'
        return f'<svg class="chart" {box} role="img" aria-label="{escape(self.name)}">{self.body}</svg>'


def _places(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def staircase_chart(staircase: Staircase, schedule: Schedule | None) -> Chart:
    """Latency over tokens: every measured point with its interval, the treads, and the counts in `schedule`."""
    points, ends = staircase.points, treads(staircase)
    x = across(points[0].tokens, points[-1].tokens)
    y = Axis(0, 1.06 * max(p.latency.interval_ms[1] for p in points), HEIGHT - BOTTOM, TOP)
    chart = Chart("Staircase: latency over tokens", x, y, ("tokens in every block", "latency of all blocks, ms"))
    outline = [(p, bound) for bound, run in ((1, points), (0, points[::-1])) for p in run]
    chart.line([(x(p.tokens), y(p.latency.interval_ms[bound])) for p, bound in outline], "band")
    steps = []
    for start, end in pairwise((points[0].tokens, *ends)):
        level = y(trunk_ms(staircase, end))
        steps += [(x(start), level), (x(end), level)]
    chart.line(steps, "tread")
    chosen = sorted(set(schedule.tokens)) if schedule else []
    for count in chosen:
        chart.line([(x(count), y(trunk_ms(staircase, count))), (x(count), y(0))], "drop")
    for point in points:
        kind = "tread-end" if point.tokens in ends else "point"
        chart.dot(x(point.tokens), y(point.latency.median_ms), kind, _point_tooltip(point.tokens, point.latency), 2.2)
    free = float("inf")
    for count in reversed(chosen):
        ms = trunk_ms(staircase, count)
        chart.dot(x(count), y(ms), "chosen", f"{count} tokens, chosen: {ms:.3f} ms", 4.5)
        if x(count) < free - 24:  # room for three digits next to the previous one
            chart.text(str(count), max(x(count), LEFT + 12), y(ms) - 10, kind="strong")
            free = x(count)
    return chart


def _point_tooltip(tokens: int, latency: Latency) -> str:
    low, high = latency.interval_ms
    return f"{tokens} tokens: {latency.median_ms:.3f} ms ({low:.3f} to {high:.3f})"


def tokens_chart(schedule: Schedule) -> Chart:
    """One bar per block, as high as the number of tokens that leave it."""
    vit, tokens = schedule.vit, schedule.tokens
    x, y = across(0, vit.depth), Axis(0, 1.1 * vit.tokens, HEIGHT - BOTTOM, TOP)
    chart = Chart("Tokens leaving each block", x, y, ("block", "tokens leaving the block"), numbered="y")
    chart.line([(LEFT, y(vit.tokens)), (WIDTH - RIGHT, y(vit.tokens))], "dense")
    wide = x(1) - x(0)
    for block, count in enumerate(tokens):
        prefix_only = schedule.prefix_last and block == vit.depth - 1
        kind = "bar prefix-only" if prefix_only else "bar cut" if block in schedule.cuts else "bar"
        tooltip = f"block {block}: {count} tokens" + (", only its prefix tokens are computed" if prefix_only else "")
        chart.bar(x(block) + 0.12 * wide, y(count), 0.76 * wide, y(0) - y(count), kind, tooltip)
        if wide > 24 or block in schedule.cuts or block == 0:
            chart.text(
                str(count), x(block + 0.5), y(count) - 5, "middle", "strong" if block in schedule.cuts else "tick"
            )
        if wide > 18 or block % 4 == 0:
            chart.text(str(block), x(block + 0.5), y(0) + 16)
    return chart


def front_chart(
    front: Sequence[Candidate],
    others: Sequence[Candidate],
    schedule: Schedule,
    dense_ms: float,
    task: Task,
) -> Chart:
    """Loss (KL) over predicted latency: the Pareto front (fastest first), dominated schedules, and the one chosen."""
    seen = (*others, *front)
    ms = [c.predicted_ms for c in seen] + [dense_ms]
    room = 0.04 * (max(ms) - min(ms))
    x = across(min(ms) - room, max(ms) + room)
    exponents = [floor(log10(max(c.loss, LEAST_LOSS))) for c in seen]
    y = Axis(10.0 ** min(exponents), 10.0 ** (max(exponents) + 1), HEIGHT - BOTTOM, TOP, log=True)
    unit = f", {task.loss_unit}" if task.loss_unit else ""
    labels = "predicted latency, ms", f"{task.loss_name} to the unpruned model{unit}"
    chart = Chart(f"Pareto front: {task.loss_name} over predicted latency", x, y, labels)
    chart.line([(x(dense_ms), y(y.low)), (x(dense_ms), y(y.high))], "dense")
    chart.text("unpruned", x(dense_ms) - 4, TOP + 10, "end")

    def place(candidate: Candidate) -> tuple[float, float]:
        return x(candidate.predicted_ms), y(max(candidate.loss, LEAST_LOSS))

    for candidate in others:
        chart.dot(*place(candidate), "point", _figures(candidate, dense_ms), 2)
    chart.line([place(c) for c in front], "front")
    for candidate in front:
        chart.dot(*place(candidate), "on-front", _figures(candidate, dense_ms), 3)
    for candidate in seen:
        if candidate.tokens == schedule.tokens:
            across_px, down_px = place(candidate)
            chart.dot(across_px, down_px, "chosen", f"chosen: {_figures(candidate, dense_ms)}", 5)
            chart.text("chosen", across_px + 9, down_px - 7, "start", "strong")
    return chart


def _figures(candidate: Candidate, dense_ms: float) -> str:
    tokens = ", ".join(map(str, candidate.tokens))
    faster = dense_ms / candidate.predicted_ms
    figure = f"KL {candidate.kl:.4f}" if candidate.kl is not None else f"cosine {candidate.cosine or 0:.4f}"
    figure = figure if candidate.error is None else f"relative error {candidate.error:.4f}"
    return f"{candidate.predicted_ms:.3f} ms ({faster:.2f}×), {figure}, tokens {tokens}"


def trials_chart(trials: Sequence[Trial], schedule: Schedule) -> Chart:
    """One row per schedule that was built: its predicted and its measured latency."""
    values = [v for t in trials for v in (t.predicted_ms, t.latency.median_ms, *t.latency.interval_ms)]
    room = 0.08 * (max(values) - min(values))
    x, row = across(min(values) - room, max(values) + room), 46
    height = row * len(trials) + BOTTOM
    name, labels = "Predicted against measured latency", ("latency, ms", "")
    chart = Chart(name, x, Axis(0, 1, 0, 1), labels, height, numbered="x")
    for index, trial in enumerate(trials):
        middle = row * index + 32
        ms, (low, high) = trial.latency.median_ms, trial.latency.interval_ms
        chosen = trial.tokens == schedule.tokens
        off = 100 * (trial.predicted_ms / ms - 1)
        digits = 1 if abs(off) < 10 else 0
        name = f"{index + 1}{', chosen' if chosen else ''}"
        text = f"{name}: predicted {trial.predicted_ms:.4g}, measured {ms:.4g} ms ({off:+.{digits}f} %)"
        chart.text(text, 0, middle - 13, "start", "ink" if chosen else "tick")
        chart.line([(LEFT, middle), (WIDTH - RIGHT, middle)], "grid")
        chart.line([(x(trial.predicted_ms), middle), (x(ms), middle)], "gap")
        chart.line([(x(low), middle), (x(high), middle)], "interval")
        chart.dot(x(trial.predicted_ms), middle, "predicted", f"predicted {trial.predicted_ms:.3f} ms", 5)
        chart.dot(x(ms), middle, "chosen" if chosen else "measured", f"measured {ms:.3f} ms", 5)
    return chart


def recovery_chart(recovery: Recovery) -> Chart:
    """Loss on the pictures that recovery did not train on, before the first epoch and after each; the kept state."""
    curve, task = recovery.curve, BY_NAME[recovery.task]
    unit = f", {task.loss_unit}" if task.loss_unit else ""
    x = across(0, len(curve) - 1)
    y = Axis(0, 1.06 * max(*curve, LEAST_LOSS), HEIGHT - BOTTOM, TOP)
    chart = Chart(f"Recovery: {task.loss_name} over epochs", x, y, ("epochs", f"{task.loss_name}{unit}"))
    chart.line([(x(epoch), y(loss)) for epoch, loss in enumerate(curve)], "tread")
    for epoch, loss in enumerate(curve):
        if epoch != recovery.epochs:
            chart.dot(x(epoch), y(loss), "point", f"epoch {epoch}: {loss:.4f} {task.loss_unit}".rstrip())
    kept = recovery.epochs
    chart.star(x(kept), y(curve[kept]), "chosen", f"epoch {kept}, kept: {curve[kept]:.4f} {task.loss_unit}".rstrip())
    return chart
