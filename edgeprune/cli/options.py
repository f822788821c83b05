"""What the commands share: their options, the progress bar, and where output goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.errors import InputError

Device = Annotated[str, typer.Option(help="cpu, cuda, a Jetson (see `edgeprune devices`), or your own .toml")]
Model = Annotated[str, typer.Option(help="a timm VisionTransformer by name; default: the embedded one")]
Weights = Annotated[
    str | None, typer.Option(help="pretrained | embedded | FILE (.safetensors, or .pth with tensors only)")
]
Images = Annotated[
    Path | None, typer.Option(help="folder of class folders, CSV `image[,label]`, or folder of pictures")
]
Method = Annotated[str, typer.Option(help="how tokens are lost: fold | pomt | tome | evit | topk | none")]
Policy = Annotated[str, typer.Option(help="search: cuts in any blocks, by KL | paper: one block, by utility")]
Alpha = Annotated[float | None, typer.Option(help="weight of latency in the utility, 0 to 1", min=0, max=1)]
Speedup = Annotated[float | None, typer.Option(help="be at least this many times faster")]
Budget = Annotated[float | None, typer.Option("--budget-ms", help="take at most this many ms")]
MaxDrop = Annotated[float | None, typer.Option(help="lose at most these points of top-1", min=0)]
Precision = Annotated[str, typer.Option(help="fp32 | fp16 | int8")]
Batch = Annotated[int, typer.Option(help="images in one inference")]
WholeLast = Annotated[
    bool, typer.Option("--whole-last", help="compute the whole last block, though the head reads the prefix alone")
]
Work = Annotated[Path, typer.Option(help="folder that keeps finished steps")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")]
Simulate = Annotated[bool, typer.Option(help="latency from the device's tail-effect model, not from hardware")]
Exhaustive = Annotated[bool, typer.Option(help="probe every token count")]
Block = Annotated[int, typer.Option(help="block of the single cut (policy paper)", min=0)]
CropPct = Annotated[float | None, typer.Option(help="override the data config", min=0.05, max=1)]
Interpolation = Annotated[str | None, typer.Option(help="override the data config")]
Mean = Annotated[str | None, typer.Option(help="override the data config: r,g,b")]
Std = Annotated[str | None, typer.Option(help="override the data config: r,g,b")]
LockClocks = Annotated[bool, typer.Option("--lock-clocks", help="clocks at their maximum while measuring (root)")]
OnHost = Annotated[
    str | None, typer.Option("--host", help="USER@HOST: the device, over ssh; it needs edgeprune, no torch")
]
HostProgram = Annotated[str, typer.Option(help="edgeprune on that host, where it is not in the PATH")]
SearchImages = Annotated[int, typer.Option(help="pictures that schedules are compared on", min=1)]


def goal_from(alpha: Any, speedup: Any, budget_ms: Any, max_drop: Any) -> Any:
    from edgeprune.scheduling.goals import Goal

    if sum(value is not None for value in (alpha, speedup, budget_ms, max_drop)) > 1:
        raise typer.BadParameter("pass at most one of --alpha, --speedup, --budget-ms and --max-drop")
    if speedup is not None and not 1 <= speedup < 1e6:
        raise typer.BadParameter("--speedup is a factor of at least 1")
    if budget_ms is not None and not 0 < budget_ms < 1e9:
        raise typer.BadParameter("--budget-ms is above 0")
    return Goal(alpha=alpha, speedup=speedup, budget_ms=budget_ms, max_drop=max_drop)


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
