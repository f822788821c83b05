"""Every method at equal measured latency on the real ViT-Tiny: the tables of docs/benchmarks.md.

python benchmarks/frontier.py --weights FILE --images CSV --plot docs/frontier-vit-tiny.svg
Prints a Markdown table, the goals that the project set itself, and one JSON line last. Some 16 min on 2 cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import stats
from edgeprune.cli import output
from edgeprune.cli.rows import compare_rows
from edgeprune.cli.tables import runs
from edgeprune.html_report.files import compare_svg
from edgeprune.pipeline.compare import Comparison, Entry, compare
from edgeprune.pipeline.context import Options, context_for
from edgeprune.pipeline.evaluate import logits_on
from edgeprune.pipeline.onnx_files import dense_onnx, pruned_onnx

GOALS = (  # target, published baseline, the most that fold's KL may be as a share of its KL
    (1.5, "pomt", 0.4),
    (1.5, "tome", 0.6),
    (2.0, "pomt", 0.4),
    (2.0, "tome", 0.9),
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows by target speed-up, the lowest KL first."""
    lines = [
        "| target | method | shape | measured speed-up (95 %) | predicted | top-1, % | agreement, % | KL "
        "| ΔKL to fold (± s.e.) | Δtop-1 to fold (± s.e.) | tokens |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in sorted(rows, key=lambda r: (r["target"], r["kl"])):
        low, high = row["speedup_interval"]
        predicted = row["dense_latency_ms"]["median"] / row["predicted_ms"]
        lines.append(
            f"| {row['target']:g}× | {row['method']} | {row['policy']} | {row['speedup']:.3f} ({low:.3f}–{high:.3f}) "
            f"| {predicted:.3f} | {row['top1']:.2f} | {row['agreement']:.2f} | {row['kl']:.4f} "
            f"| {apart(row, 'kl', 4)} | {apart(row, 'top1', 1)} | {runs(tuple(row['tokens']))} |"
        )
    return "\n".join(lines)


def apart(row: dict[str, Any], name: str, digits: int) -> str:
    """The difference to fold's searched schedule for the same target and its standard error."""
    more, error = row["more_than_fold"][name]
    return f"{more:+.{digits}f} ± {error:.{digits}f}" if error else "–"


def with_errors(options: Options, comparison: Comparison, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `more_than_fold`: mean difference to fold's searched schedule and its standard error over pictures.

    Differences are paired by picture. The outputs are those that `compare` has left in the work folder.
    """
    context = context_for(options)
    pool, each = context.needed_pictures(), []
    with context.target.work.lock():
        kept, _ = pool.held_out("fold", "fp32")
        dense, labels = logits_on(context, pool, dense_onnx(context))[kept], np.array(pool.labels(kept))
        for entry in comparison.entries:
            own = context.with_method(entry.method)
            found = logits_on(own, pool, pruned_onnx(own, entry.schedule))[kept]
            right = 100.0 * (found.argmax(1) == labels)
            each.append({"kl": stats.kl_per_image(dense, found), "top1": right})
    base = {e.target: own for e, own in zip(comparison.entries, each, strict=True) if is_ours(e)}
    for row, entry, own in zip(rows, comparison.entries, each, strict=True):
        changes = {name: own[name] - base.get(entry.target, own)[name] for name in own}
        row["more_than_fold"] = {n: (float(c.mean()), stats.standard_error(c)) for n, c in changes.items()}
    return rows


def is_ours(entry: Entry) -> bool:
    """Is it fold with a searched schedule?"""
    return (entry.method, entry.policy) == ("fold", "search")


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """fold with search against the published baselines, KL as a share of theirs."""
    found = {(r["method"], r["policy"], r["target"]): r for r in rows}
    result = []
    for target, method, most in GOALS:
        ours, theirs = found.get(("fold", "search", target)), found.get((method, "published", target))
        share = ours["kl"] / theirs["kl"] if ours and theirs else None
        result.append({"target": target, "against": method, "kl_share": share, "goal": most})
    return result


def main() -> None:
    """Compare, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--methods", default="fold,pomt,tome,topk,evit,none")
    parser.add_argument("--targets", default="1.25,1.5,2.0")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path("engines/.work"))
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    options = Options(
        device="cpu",
        model=args.model,
        weights=args.weights,
        images=Path(args.images),
        rounds=args.rounds,
        work=args.work,
    )
    with output.progress() as progress:
        comparison = compare(options, args.methods.split(","), [float(t) for t in args.targets.split(",")], progress)
    rows = with_errors(options, comparison, compare_rows(comparison))
    print(markdown(rows))
    for method, policy, target, reason in comparison.missing:
        print(f"\nnot reached: {method}, {policy}, {target:g}×: {reason}")
    if args.plot:
        args.plot.write_bytes(compare_svg(rows))
    print(json.dumps({"rows": rows, "goals": goals(rows), "missing": comparison.missing}))


if __name__ == "__main__":
    main()
