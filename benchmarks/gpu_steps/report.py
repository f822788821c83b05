"""Markdown for docs/benchmarks.md from the JSON of the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpu_steps.kit import read_json

NOT_RUN = "This run has not been made yet: no GPU has been measured."
Row = Mapping[str, Any]


def markdown(folder: Path) -> str:
    """All steps that have a file in `folder`, and in its folders of --sm-limit."""
    found = _steps(folder)
    lines = [_about(found[0]["about"])] if found else [NOT_RUN]
    for step in found:
        lines += ["", *_step(step)]
    for limited in sorted(folder.glob("sm-*")):
        for step in _steps(limited):
            lines += ["", f"**Limited to {step['about']['sm_limit']} SMs.**", "", *_step(step)]
    return "\n".join(lines)


def _steps(folder: Path) -> list[Any]:
    return [read_json(path) for path in sorted(folder.glob("step-?.json"))]


def _about(about: Row) -> str:
    known = [str(about[key]) for key in ("gpu", "machine") if about.get(key)][:1]
    known += [f"{about['runtime']} {about['runtime_version']}"] + ([about["options"]] if about.get("options") else [])
    return f"Measured on {', '.join(known)}."


def _step(step: Row) -> list[str]:
    lines = [f"### Step {step['step']}: {step['title']}"]
    table = TABLES.get(step["step"])
    for name, part in step["parts"].items():
        lines += ["", *(table(name, part) if table else [f"- {name}: {_short(part)}"])]
        if isinstance(part, dict) and len(kinds := {str(ran) for ran in _graphs(part)}) > 1:
            lines += ["", f"Engines with and without a CUDA graph ({', '.join(sorted(kinds))}): do not compare them."]
    for what in ("skipped", "failed"):
        lines += [f"- {name} ({what}): {reason}" for name, reason in step[what].items()]
    return [*lines, *(["", f"Not finished: {', '.join(step['left'])}."] if step["left"] else [])]


def _graphs(part: Any) -> list[Any]:
    """Whether engines ran as a CUDA graph, of all that a part has."""
    if not isinstance(part, dict):
        return []
    own = part.get("cuda_graph", [])
    found = list(own.values()) if isinstance(own, dict) else own if isinstance(own, list) else [own]
    return found + [ran for row in [*part.get("rows", []), *part.get("precisions", [])] for ran in _graphs(row)]


def _short(part: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in part.items()) if isinstance(part, dict) else str(part)[:300]


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(head: str, rows: list[list[str]]) -> list[str]:
    return [f"| {head} |", "|" + " --- |" * (head.count("|") + 1), *(f"| {' | '.join(row)} |" for row in rows)]


def _parity(name: str, part: Row) -> list[str]:
    if "overlap" in part:
        return [f"{name}: " + ", ".join(f"{m} {100 * share:.1f} %" for m, share in part["overlap"].items())]
    keys = ("median_difference", "largest_difference", "agreement", "kl", "agreement_unpruned", "top1")
    rows = [
        [row["name"], *([row["error"], *["–"] * 5] if "error" in row else [_number(row[k], 4) for k in keys])]
        for row in part["rows"]
    ]
    head = "graph | median difference | largest | agreement, % | KL | with unpruned, % | top-1, %"
    return [f"{name}, {part['images']} pictures, against PyTorch in fp32", "", *_table(head, rows)]


def _kernels(name: str, part: Row) -> list[str]:
    if "kernels" in part:
        names = ", ".join(f"`{row['name']}` ({row['launches']})" for row in part["attention"]) or "none"
        return [f"- {name}: {len(part['kernels'])} kernels; of attention: {names}"]
    names = ", ".join(f"`{each}`" for each in part["attention"]) or "none"
    counted = "unknown" if part["fused"] is None else part["fused"]
    return [f"- {name}: {part['layers']} layers, fused {counted}, expected {part['expected']}; of attention: {names}"]


def _timings(name: str, part: Row) -> list[str]:
    rows = [
        [way, *(_number(ms[key], 4) for key in ("median", "low", "high", "p99"))] for way, ms in part["ms"].items()
    ]
    return [f"{name}, {part['samples']} samples", "", *_table("way | median, ms | low | high | p99", rows)]


def _staircase(name: str, part: Row) -> list[str]:
    rows = []
    for count, samples in part["samples_ms"].items():
        ordered = sorted(samples)
        rows.append([count, _number(1e3 * ordered[len(ordered) // 2], 2), str(len(ordered))])
    return [f"{name}, one block in {part['precision']}", "", *_table("tokens | median, µs | samples", rows)]


def _simulation(name: str, part: Row) -> list[str]:
    keys = ("recall", "precision", "chance_recall", "rank_correlation", "measured_over_simulated")
    return [
        f"- {name}: {len(part['measured_edges'])} edges measured, {len(part['simulated_edges'])} simulated; "
        + ", ".join(f"{key.replace('_', ' ')} {_number(part[key])}" for key in keys)
    ]


def _precisions(name: str, part: Row) -> list[str]:
    rows = [
        [row["graph"], row["precision"], _number(row["ms"]["median"], 4), _number(row["over_fp16"]),
         "–".join(_number(x) for x in row["interval"])]
        for row in part["precisions"]
    ]  # fmt: skip
    missing = [f"- {kind}: {reason}" for what in ("lacking", "errors") for kind, reason in part[what].items()]
    table = _table("graph | precision | median, ms | over fp16 | 95 %", rows)
    return [name, "", *table, *(["", *missing] if missing else [])]


def _depth(name: str, part: Row) -> list[str]:
    rows = [
        [str(row["tokens"]), *(_number(row[key], 4) for key in ("trunk_ms", "predicted_ms")),
         f"{100 * row['error']:+.1f} %"]
        for row in part["rows"]
    ]  # fmt: skip
    seconds = ", ".join(f"{each} {_number(value, 1)} s" for each, value in part["build_s"].items())
    said = f"the check is {100 * part['check_off']:.1f} % off, {100 * part['allowed']:.0f} % are allowed"
    head = "tokens | trunk, ms | from two blocks, ms | error"
    return [f"{name}, {part['precision']}; {said}; compiling: {seconds}", "", *_table(head, rows)]


def _methods(name: str, part: Row) -> list[str]:
    if "precisions" in part:
        return _precisions(name, part)
    if "unpruned" not in part:
        rows = [
            [row["method"], f"{row['entering']} to {row['leaving']}", _number(row["added_us"], 2),
             "–".join(_number(x, 2) for x in row["interval_us"]), _number(row["block_us"], 2)]
            for row in part["rows"]
        ]  # fmt: skip
        return [name, "", *_table("method | tokens | a cut adds, µs | 95 % | block, µs", rows)]
    share, percents = part["equal_latency"]["share_of_unpruned"], part["equal_latency"]["percent_of_tokens"]
    rows = [
        [row["method"], str(row["percent"]), _number(row["ms"]["median"], 4), _number(row["speedup"]),
         "–".join(_number(x) for x in row["interval"])]
        for row in part["rows"]
    ]  # fmt: skip
    equal = ", ".join(f"{method} {_number(value, 1)}" for method, value in percents.items())
    head = "method | tokens, % | median, ms | speed-up | 95 %"
    lines = [f"{name}, unpruned {part['unpruned']['ms']['median']:.4f} ms", "", *_table(head, rows)]
    return [*lines, "", f"Tokens in percent at {_number(share)} of the unpruned latency: {equal}."]


TABLES: dict[int, Callable[[str, Row], list[str]]] = {
    2: _parity, 3: _kernels, 4: _timings, 5: _staircase, 6: _simulation, 7: _methods, 9: _depth,
}  # fmt: skip
