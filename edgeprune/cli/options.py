"""The options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.errors import InputError
from edgeprune.scheduling import DEFAULT_ALPHA

Device = Annotated[str, typer.Option(help="cpu, cuda, a Jetson (see `edgeprune devices`), or your own .toml")]
Model = Annotated[
    str,
    typer.Option(help="name of a timm VisionTransformer or Eva, or a FOLDER of transformers; default: the embedded"),
]
Weights = Annotated[
    str | None, typer.Option(help="pretrained | embedded | FILE (.safetensors, or .pth with tensors only)")
]
Images = Annotated[
    Path | None, typer.Option(help="folder of class folders, CSV `image[,label]`, or folder of pictures")
]
Method = Annotated[str, typer.Option(help="how tokens are removed: fold | pomt | tome | evit | topk | none")]
Policy = Annotated[str, typer.Option(help="search: cuts in any blocks, lowest KL | paper: one cut, highest utility")]
Alpha = Annotated[
    float | None,
    typer.Option(
        help=f"goal: weight of latency in the utility, 0 to 1; the default goal is {DEFAULT_ALPHA:g}", min=0, max=1
    ),
]
Speedup = Annotated[float | None, typer.Option(help="goal: at least this many times faster")]
Budget = Annotated[float | None, typer.Option("--budget-ms", help="goal: at most this many ms per inference")]
MaxDrop = Annotated[float | None, typer.Option(help="goal: lose at most this many points of top-1", min=0)]
MinCosine = Annotated[
    float | None,
    typer.Option(help="goal: mean cosine to the unpruned embeddings of at least this much", min=0, max=1),
]
MaxError = Annotated[
    float | None,
    typer.Option(help="goal: relative error of dense features, or of the --head's output, of at most this", min=0),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="classify | embed | dense: what the output is for; default: embed for a model without a head, dense "
        "with --layers or --head"
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="3,6,9,12", help="blocks, from 1, whose patch features are outputs, on the full grid"),
]
HeadFile = Annotated[
    Path | None,
    typer.Option("--head", help="ONNX that takes dense features: the error of its output is what counts"),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--text-embeddings", help=".npy (classes, C) of the names of classes, for zero-shot figures of embeddings"
    ),
]
Precision = Annotated[str, typer.Option(help="fp32 | fp16 | int8 | fp8")]
AnyPrecision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="fp32 | fp16 | int8 | fp8 | auto: builds all that the device has, keeps the fastest good one",
    ),
]
Batch = Annotated[int, typer.Option(help="images per inference")]
WholeLast = Annotated[
    bool,
    typer.Option("--whole-last", help="compute the whole last block even if the head reads only the prefix tokens"),
]
OnRay = Annotated[
    str | None,
    typer.Option("--ray", help="local | auto | HOST:PORT: evaluate schedules on a Ray cluster; needs the extra ray"),
]
Work = Annotated[Path, typer.Option(help="folder that keeps finished steps")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")]
Simulate = Annotated[
    bool, typer.Option(help="take latencies from the tail-effect model of the device instead of hardware")
]
Exhaustive = Annotated[bool, typer.Option(help="measure every token count")]
Block = Annotated[int, typer.Option(help="block of the single cut with --policy paper", min=0)]
CropPct = Annotated[float | None, typer.Option(help="crop percentage, instead of the model's own", min=0.05, max=1)]
ImageSize = Annotated[
    str | None,
    typer.Option("--image-size", help="pictures of H,W pixels, or N for N,N, instead of the model's own size"),
]
Interpolation = Annotated[str | None, typer.Option(help="interpolation, instead of the model's own")]
Mean = Annotated[str | None, typer.Option(help="mean as r,g,b, instead of the model's own")]
Std = Annotated[str | None, typer.Option(help="standard deviation as r,g,b, instead of the model's own")]
LockClocks = Annotated[
    bool, typer.Option("--lock-clocks", help="lock the clocks at their maximum while measuring (needs root)")
]
OnHost = Annotated[
    str | None, typer.Option("--host", help="USER@HOST of the device, used over ssh; it needs edgeprune but no torch")
]
HostProgram = Annotated[str, typer.Option(help="path of edgeprune on that host, if it is not in its PATH")]
SearchImages = Annotated[int, typer.Option(help="pictures on which schedules are compared", min=1)]

Recover = Annotated[
    str | None,
    typer.Option(
        metavar="[DIR|CSV]",
        help="tune the pruned model to the unpruned one on these pictures without labels; alone: on half of --images",
    ),
]


def recover_from(value: str | None) -> Path | bool:
    """The value of --recover for Options; without a value it is empty (app.Commands)."""
    return Path(value) if value else value is not None


def size_from(value: str | None) -> tuple[int, int] | None:
    from edgeprune.images import image_size

    return image_size(value)


def layers_from(value: str | None) -> tuple[int, ...]:
    """The value of --layers for Options. Raises InputError."""
    if value is None:
        return ()
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise InputError(f"--layers {value!r}: pass numbers of blocks as 3,6,9,12") from None


def goal_from(alpha: Any, speedup: Any, budget_ms: Any, max_drop: Any, min_cosine: Any, max_error: Any) -> Any:
    from edgeprune.scheduling.goals import Goal

    goal = Goal(alpha, speedup, budget_ms, max_drop, min_cosine, max_error)
    try:
        goal.check()
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    return goal


def overrides_from(
    crop_pct: float | None, interpolation: str | None, mean: str | None, std: str | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if crop_pct is not None:
        found["crop_pct"] = crop_pct
    if interpolation is not None:
        found["interpolation"] = interpolation
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                values = tuple(float(part) for part in text.split(","))
            except ValueError:
                values = ()
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                raise InputError(f"--{name} {text!r}: pass three numbers as r,g,b")
            found[name] = values
    return found
