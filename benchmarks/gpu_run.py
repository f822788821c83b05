"""One run on a GPU machine with TensorRT, in nine steps of less than 10 minutes each; torch is not needed there.

python benchmarks/gpu_run.py --prepare KIT [--weights FILE --images CSV]     before, where torch is; no GPU
python benchmarks/gpu_run.py --step N --kit KIT --out DIR [--device D]       there, N from 1 to 9
python benchmarks/gpu_run.py --report DIR                                    Markdown from DIR/step-N.json

EDGEPRUNE_GPU_WORK names a folder for engines that stays between calls (default: OUT/work). A step writes
OUT/step-N.json after each of its parts; called again, it goes on with the parts that are not finished. The last line
of stdout is one JSON object. --device cpu rehearses all but the GPU. --sm-limit 8 keeps the process to 8 of the GPU's
SMs and writes to OUT/sm-8.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(path) for path in (ROOT, ROOT / "benchmarks") if str(path) not in sys.path]

from gpu_steps import checks, depth, green_context, latencies  # noqa: E402
from gpu_steps.report import markdown  # noqa: E402
from gpu_steps.run import Run, carried_out  # noqa: E402

from edgeprune.errors import EdgepruneError, InputError  # noqa: E402

STEPS = {
    1: ("smoke tests", checks.smoke),
    2: ("parity of every method and precision", checks.parity),
    3: ("kernels of attention", checks.kernels),
    4: ("ways of timing", checks.timings),
    5: ("staircases of one block", latencies.staircases),
    6: ("measured against simulated edges", latencies.against_simulation),
    7: ("methods at equal tokens and equal latency", latencies.methods),
    8: ("every command of the device half", checks.commands),
    9: ("two blocks for the trunk", depth.two_blocks),
}
OTHER_PROCESSES = (1, 3, 8)
SECONDS = 480  # of a call, after which no part and no build is begun
PARITY_MODEL, LATENCY_MODELS = "vit_tiny_patch16_224", ("vit_small_patch16_224", "vit_base_patch16_224")


def prepare(kit: Path, weights: str | None, images: Path | None) -> dict[str, Any]:
    """Write the kit: the embedded model and ViT-Tiny for parity, ViT-S and ViT-B with random weights for latency."""
    from gpu_steps.prepare import prepare_latency, prepare_parity

    from edgeprune.vit.models import load_model

    prepare_tests(kit)
    prepare_parity(kit, load_model(PARITY_MODEL, weights or "random"), images)
    for name in LATENCY_MODELS:
        prepare_latency(kit, load_model(name, "random"))
    files = [path for path in kit.rglob("*") if path.is_file()]
    return {"kit": str(kit), "files": len(files), "mib": round(sum(f.stat().st_size for f in files) / 2**20, 1)}


def prepare_tests(kit: Path) -> dict[str, Any]:
    """Write what tests/gpu needs: the embedded model, also as `export --trunk` writes it."""
    from gpu_steps.prepare import prepare_parity

    from edgeprune import zoo
    from edgeprune.vit.models import load_model
    from edgeprune.vit.profiling_models import export_profiling_models

    model = load_model(zoo.EMBEDDED)
    prepare_parity(kit, model, zoo.images_dir() / "labels.csv")
    export_profiling_models(model, ("pomt", "fold"), 1, kit / zoo.EMBEDDED / "probes", "fp16", tensorrt=True)
    return {"kit": str(kit)}


def step(number: int, run: Run) -> dict[str, Any]:
    """Carry out one step; the summary that is printed. Raises EdgepruneError where the machine cannot be used."""
    if run.sm_limit is not None:
        if number in OTHER_PROCESSES:
            raise InputError(f"step {number} starts other processes, which have the whole GPU: leave out --sm-limit")
        got = green_context.limit(run.sm_limit)
        run = replace(run, sm_limit=got, out=run.out / f"sm-{got}", work=run.work / f"sm-{got}", graphs=run.work)
    title, parts_of = STEPS[number]
    found = carried_out(run, number, title, parts_of(run))
    keys = ("step", "title", "complete", "left", "skipped", "failed", "seconds")
    return {key: found[key] for key in keys} | {
        "done": len(found["parts"]),
        "file": str(run.out / f"step-{number}.json"),
    }


def infer(engine: Path) -> dict[str, Any]:
    """Run an engine a few times, for a profiler that watches this process."""
    from edgeprune.runtimes.trt_session import TrtSession

    with TrtSession(engine) as session:
        return {"engine": str(engine), "ms": session.time_ms()}


def arguments(given: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", type=Path, metavar="KIT")
    what.add_argument("--prepare-tests", type=Path, metavar="KIT", help="only what tests/gpu needs")
    what.add_argument("--step", type=int, choices=STEPS, metavar="N")
    what.add_argument("--report", type=Path, metavar="DIR")
    what.add_argument("--infer", type=Path, metavar="ENGINE", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help="of ViT-Tiny; random without")
    parser.add_argument("--images", type=Path, help="for ViT-Tiny; noise without")
    parser.add_argument("--kit", type=Path, help="that --prepare wrote")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--simulated", default="h100", help="the device that step 6 compares with")
    parser.add_argument("--jobs", type=int, default=8, help="processes that build engines which are not timed")
    parser.add_argument("--samples", type=int, default=Run.samples, help="of each way in step 4")
    parser.add_argument("--rounds", type=int, default=Run.rounds, help="of step 7")
    parser.add_argument("--stairs", type=int, default=Run.stairs, help="rounds of step 5")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which this call begins nothing new")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="parts, for example 'vit_small* b1*'")
    parser.add_argument("--sm-limit", type=int, metavar="SMS")
    args = parser.parse_args(given)
    if args.step and not (args.kit and args.out):
        parser.error("--step needs --kit and --out")
    return args


def main(given: list[str] | None = None) -> int:
    """Do what was asked and print one JSON object last; 1 where that failed."""
    args = arguments(given)
    try:
        if args.prepare:
            result = prepare(args.prepare, args.weights, args.images)
        elif args.prepare_tests:
            result = prepare_tests(args.prepare_tests)
        elif args.report:
            print(markdown(args.report))
            result = {"report": str(args.report)}
        elif args.infer:
            result = infer(args.infer)
        else:
            work = Path(os.environ.get("EDGEPRUNE_GPU_WORK") or args.out / "work")
            run = Run(
                args.kit, args.out, work, args.device, args.simulated, args.jobs, args.samples, args.rounds,
                args.stairs, args.sm_limit, time.time() + args.seconds, args.only,
            )  # fmt: skip
            result = step(args.step, run)
    except EdgepruneError as error:
        print(json.dumps({"error": " ".join(str(error).split())}))
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
