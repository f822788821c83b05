"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.errors import InputError
from edgeprune.scheduling import DEFAULT_ALPHA

Device = Annotated[str, typer.Option(help="cpu, cuda, a Jetson (see `edgeprune devices`), or your own .toml")]
Model = Annotated[
    str,
    typer.Option(help="timm VisionTransformer or Eva, or FOLDER saved by transformers; default: the embedded model"),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="pretrained | embedded | FILE (.safetensors, or .pth with tensors only); default: pretrained, or "
        "embedded for the embedded model"
    ),
]
Images = Annotated[
    Path | None, typer.Option(help="folder of class folders, CSV `image[,label]`, or folder of pictures")
]
Method = Annotated[str, typer.Option(help="how tokens are removed: fold | pomt | tome | evit | topk | none")]
Policy = Annotated[str, typer.Option(help="search: cuts in any blocks, lowest KL | paper: one cut, highest utility")]
Alpha = Annotated[
    float | None,
    typer.Option(
        help=f"goal: weight of latency in the utility, 0 to 1; default without another goal: {DEFAULT_ALPHA:g}",
        min=0,
        max=1,
    ),
]
Speedup = Annotated[float | None, typer.Option(help="goal: minimum speed-up over the unpruned model, at least 1")]
Budget = Annotated[float | None, typer.Option("--budget-ms", help="goal: maximum latency per inference, ms")]
MaxDrop = Annotated[float | None, typer.Option(help="goal: maximum drop in top-1, percentage points", min=0)]
MinCosine = Annotated[
    float | None,
    typer.Option(help="goal: minimum mean cosine similarity to the unpruned embeddings", min=0, max=1),
]
MaxError = Annotated[
    float | None,
    typer.Option(help="goal: maximum relative error of dense features, or of the --head output", min=0),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="classify | embed | dense: type of output; default: classify, embed for a model without a head, dense "
        "with --layers or --head"
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="3,6,9,12", help="blocks (from 1) whose patch features are outputs, on the full grid"),
]
HeadFile = Annotated[
    Path | None,
    typer.Option("--head", help="ONNX head that takes the dense features; the error is then that of its output"),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--text-embeddings", help=".npy (classes, C) with text embeddings of the class names, for zero-shot metrics"
    ),
]
Precision = Annotated[str, typer.Option(help="fp32 | fp16 | int8 | fp8")]
AnyPrecision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="fp32 | fp16 | int8 | fp8 | auto: build every precision the device supports, keep the fastest accepted",
    ),
]
Batch = Annotated[int, typer.Option(help="images per inference")]
WholeLast = Annotated[
    bool,
    typer.Option("--whole-last", help="compute the whole last block even if the head reads only the prefix tokens"),
]
OnRay = Annotated[
    str | None,
    typer.Option("--ray", help="local | auto | HOST:PORT: evaluate schedules on Ray; needs the `ray` extra"),
]
Work = Annotated[Path, typer.Option(help="work folder, which keeps finished steps for reuse")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")]
Simulate = Annotated[
    bool, typer.Option(help="take latencies from the tail-effect model of the device instead of measuring")
]
Exhaustive = Annotated[bool, typer.Option(help="measure every token count")]
Block = Annotated[int, typer.Option(help="block of the single cut with --policy paper, counted from 0", min=0)]
CropPct = Annotated[float | None, typer.Option(help="override the model's crop_pct", min=0.05, max=1)]
ImageSize = Annotated[
    str | None,
    typer.Option("--image-size", help="input size H,W in pixels, or N for a square, instead of the model's own"),
]
Interpolation = Annotated[str | None, typer.Option(help="override the model's interpolation")]
Mean = Annotated[str | None, typer.Option(help="override the model's mean, as r,g,b")]
Std = Annotated[str | None, typer.Option(help="override the model's std, as r,g,b")]
LockClocks = Annotated[
    bool, typer.Option("--lock-clocks", help="lock the clocks at their maximum while measuring (needs root or sudo)")
]
OnHost = Annotated[
    str | None,
    typer.Option("--host", help="USER@HOST of the device, driven over ssh; needs edgeprune there, not torch"),
]
HostProgram = Annotated[str, typer.Option(help="path of edgeprune on that host, if it is not on the PATH")]
SearchImages = Annotated[int, typer.Option(help="number of pictures used to choose the schedule", min=1)]

Recover = Annotated[
    str | None,
    typer.Option(
        metavar="[DIR|CSV]",
        help="fine-tune the pruned model to match the unpruned one on these unlabelled pictures; without a value: on "
        "half of --images",
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
        raise InputError(f"--layers {value!r}: pass block numbers such as 3,6,9,12") from None


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
    """The preprocessing for Options. Raises InputError."""
    from edgeprune.preprocessing import checked

    found: dict[str, Any] = {}
    if crop_pct is not None:
        found["crop_pct"] = crop_pct
    if interpolation is not None:
        found["interpolation"] = interpolation
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                found[name] = tuple(float(part) for part in text.split(","))
            except ValueError:
                raise InputError(f"--{name} {text!r}: pass three numbers as r,g,b") from None
    return checked(found)
