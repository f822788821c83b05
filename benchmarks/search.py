"""Ways to search for a schedule on one staircase and set of pictures: the KL each reaches, and its evaluations.

python benchmarks/search.py --weights FILE --images CSV
Greedy descent (the move with the least KL per ms saved), the same with look-back (tokens then traded between cuts),
a beam of four such descents, and dynamic programming on single cuts as `edgeprune build` does it. KL is reported
on the pictures that were not used to search. Prints a Markdown table and one JSON line last. About half an hour on
2 cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edgeprune.cli import output
from edgeprune.latency.staircase import predict_ms
from edgeprune.pipeline.context import Options, context_for
from edgeprune.pipeline.profile import measured_staircase
from edgeprune.records import Candidate
from edgeprune.scheduling.search import Search, Tokens
from edgeprune.tasks import CLASSIFY
from edgeprune.vit.fidelity import Evaluator, logits_of_schedule

STRIDES = (1, 2)  # treads that one move may go down
HEAD = "| target | search | evaluations | KL, seen | KL, others | agreement, % |"
LINE = "| {target:g}× | {way} | {evaluations} | {kl_seen:.4f} | {kl:.4f} | {agreement:.1f} |"
LOOK_BACK = (8, 32)  # rounds at most, schedules that each evaluates


def lowered(search: Search, tokens: Tokens, block: int, stride: int) -> Tokens | None:
    """`tokens` with `block` lowered by `stride` treads and later blocks no higher; None below the last."""
    below = [n for n in search.levels if n < tokens[block]]
    if len(below) < stride:
        return None
    return (*tokens[:block], *(min(n, below[-stride]) for n in tokens[block:]))


def descent(search: Search, limit: float, width: int) -> Candidate:
    """`width` schedules at a time, each followed by its best moves; the first predicted within the limit wins."""
    beam = [search.candidate(search.dense, search.dense)]
    met: list[Candidate] = []
    while beam and not met:
        moved: dict[Tokens, tuple[float, Candidate]] = {}
        for here in beam:
            for block in range(search.last + 1):
                for stride in STRIDES:
                    tokens = lowered(search, here.tokens, block, stride)
                    if tokens is None:
                        continue
                    there = search.candidate(tokens, here.tokens)
                    if (gain := here.predicted_ms - there.predicted_ms) > 0:
                        moved[tokens] = ((there.kl - here.kl) / gain, there)
        best = sorted(moved.values(), key=lambda pair: (pair[0], pair[1].tokens))[:width]
        beam = [candidate for _, candidate in best]
        met = [c for c in beam if c.predicted_ms <= limit]
    return min(met, key=lambda c: c.kl)


def trades(search: Search, tokens: Tokens) -> Iterator[Tokens]:
    """One cut a tread up or down, and with it another one the other way."""
    starts = [b for b in range(search.last + 1) if tokens[b] < (search.dense[0], *tokens)[b]]
    for first in starts:
        for by in (1, -1):
            one = shifted(search, tokens, first, by)
            if one is not None:
                yield one
                yield from (t for s in starts if s != first and (t := shifted(search, one, s, -by)) is not None)


def shifted(search: Search, tokens: Tokens, start: int, by: int) -> Tokens | None:
    """The run of equal counts from `start` on moved by `by` treads; None where counts would rise."""
    place = search.levels.index(tokens[start]) + by
    if not 0 <= place < len(search.levels):
        return None
    out = tuple(search.levels[place] if n == tokens[start] and b >= start else n for b, n in enumerate(tokens))
    return out if list(out) == sorted(out, reverse=True) else None


def look_back(search: Search, here: Candidate, limit: float) -> Candidate:
    """Trades as long as one lowers KL within the limit."""
    for _ in range(LOOK_BACK[0]):
        near = {
            t: predict_ms(search.staircase, t, search.method, search.prefix_last) for t in trades(search, here.tokens)
        }
        fits = sorted((t for t in near if near[t] <= limit), key=lambda t: -near[t])[: LOOK_BACK[1]]
        best = min([here, *(search.candidate(t, here.tokens) for t in fits)], key=lambda c: c.kl)
        if best is here:
            break
        here = best
    return here


def dynamic(search: Search, limit: float) -> Candidate:
    """The search of `edgeprune build`."""
    return min((c for c in search.front(limit) if c.predicted_ms <= limit), key=lambda c: c.kl)


WAYS: dict[str, Callable[[Search, float], Candidate]] = {
    "greedy": lambda search, limit: descent(search, limit, 1),
    "greedy with look-back": lambda search, limit: look_back(search, descent(search, limit, 1), limit),
    "beam of 4": lambda search, limit: descent(search, limit, 4),
    "dynamic programming": dynamic,
}


def main() -> None:
    """Search, evaluate on the other pictures, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--method", default="fold")
    parser.add_argument("--targets", default="1.5,2.0")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--search-images", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("engines/.work"))
    args = parser.parse_args()
    options = Options(
        model=args.model, weights=args.weights, images=Path(args.images), method=args.method,
        search_images=args.search_images, work=args.work,
    )  # fmt: skip
    with output.progress() as progress:
        context = context_for(options, progress)
        pictures, model = context.needed_pictures(), context.model
        staircase = measured_staircase(context.target, model, (args.method,))
        dense_ms = staircase.dense.median_ms
        seen = pictures.pixels[pictures.search]
        others = pictures.pixels[np.setdiff1d(np.arange(len(pictures.pixels)), pictures.search)]
        unpruned = logits_of_schedule(model, "none", context.dense_tokens, others)
        print(f"{HEAD}\n| ---: | --- | ---: | ---: | ---: | ---: |")
        rows = []
        for target in map(float, args.targets.split(",")):
            for name in args.ways.split(","):
                evaluator = Evaluator(model, args.method, seen, None, context.prefix_last)

                def fidelity(tokens: Tokens, base: Tokens, on: Evaluator = evaluator):  # type: ignore[no-untyped-def]
                    on.base(base)
                    return on.fidelity(tokens)

                search = Search(staircase, args.method, fidelity, context.prefix_last)
                found = WAYS[name](search, dense_ms / target)
                logits = logits_of_schedule(model, args.method, found.tokens, others, context.prefix_last)
                figures = CLASSIFY.fidelity(unpruned, logits, None)
                row = {
                    "target": target, "way": name, "evaluations": len(search.found), "kl_seen": found.kl,
                    "kl": figures.kl, "agreement": figures.agreement,
                    "predicted": dense_ms / found.predicted_ms, "tokens": found.tokens,
                }  # fmt: skip
                print(LINE.format(**row), flush=True)
                rows.append(row)
    print(json.dumps({"model": args.model, "method": args.method, "rows": rows}))


if __name__ == "__main__":
    main()
