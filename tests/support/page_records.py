"""Records of a small pruned model, for the page and its charts."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from edgeprune.html_report.page import page_html
from edgeprune.records import (
    BuildTrace,
    Candidate,
    Engine,
    Latency,
    Point,
    Preprocessing,
    Report,
    Sample,
    Schedule,
    Setup,
    Staircase,
    Trial,
    Vit,
)

HOSTILE = "\"'><img src=x onerror=document.title='broken'><script>document.title='broken'</script>&amp;"
VIT = Vit(
    name="toy",
    weights_sha256="0" * 64,
    family="vit",
    image_px=16,
    patch_px=4,
    depth=4,
    width=8,
    heads=2,
    head_dim=4,
    mlp_width=16,
    prefix=1,
    tokens=17,
    classes=2,
    prefix_pooled=True,
)
TOKENS = (17, 12, 6, 6)


def around(ms: float) -> Latency:
    """Samples with this median."""
    return Latency(samples_ms=tuple(ms * (1 + 0.01 * k) for k in range(-5, 6)))


def picture() -> bytes:
    """A small PNG."""
    file = io.BytesIO()
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(file, "PNG")
    return file.getvalue()


def records(name: str = "toy", simulated: bool = False, method: str = "fold", **figures: Any) -> dict[str, Any]:
    """What page_html takes, for a schedule with two cuts; `name` stands wherever a string is not ours."""
    vit = msgspec.structs.replace(VIT, name=name)
    setup = Setup(
        device=name,
        machine=name,
        runtime="simulated" if simulated else name,
        runtime_version=name,
        precision="fp32",
        batch=1,
        power_mode=name,
    )
    report = {"top1": 81.9, "dense_top1": 82.8, "agreement": 95.25, "kl": 0.031, "images": 650, "probes": 9}
    singles = ((12, 9.0, 0.01), (6, 7.0, 0.2))
    candidates = [Candidate((17, n, n, n), ms, kl, 90.0, None) for n, ms, kl in singles]
    return {
        "engine": Engine(path="model.onnx", sha256="1" * 64, onnx_sha256="2" * 64, size_bytes=9, setup=setup),
        "schedule": Schedule(vit=vit, method=method, policy="search", tokens=TOKENS, prefix_last=True),
        "report": Report(
            latency=around(8),
            dense_latency=around(12),
            speedup=1.5,
            speedup_interval=(1.4, 1.6),
            **report | figures,
        ),
        "staircase": Staircase(
            vit=vit,
            setup=setup,
            fixed=around(1),
            dense=around(12),
            points=tuple(Point(tokens=n, latency=around(1 + n / 2)) for n in (4, 6, 12, 17)),
        ),
        "preprocessing": Preprocessing(
            image_px=16, resize_px=16, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
        ),
        "trace": BuildTrace(
            asked=name,
            candidates=(
                *candidates,
                Candidate(TOKENS, 8.1, 0.03, 95.0, None),
                Candidate((17,) * 4, 11.9, 0, 100, None),
            ),
            trials=(
                Trial(tokens=(17, 12, 12, 12), predicted_ms=9.0, latency=around(9.2)),
                Trial(tokens=TOKENS, predicted_ms=8.1, latency=around(8)),
            ),
            samples=tuple(
                Sample(
                    picture=picture(),
                    label=name,
                    unpruned=name,
                    pruned=name,
                    groups=(
                        tuple(1 + k % 11 for k in range(16)),
                        tuple(1 + k // 4 if k > 3 else -1 for k in range(16)),
                    ),
                )
                for _ in range(2)
            ),
        ),
    }


def hostile_page() -> str:
    """A page whose every foreign string tries to break out of the markup."""
    return page_html(**records(HOSTILE))


def compare_row(method: str, policy: str, ms: float, **figures: float | None) -> dict[str, Any]:
    """A row of `compare --json` as its plot reads it; the unpruned model takes 10 ms."""
    about = {"model": "toy", "device": "test", "runtime": "simulated", "runtime_version": "1", "simulated": True}
    about |= {"precision": "fp16", "batch": 4, "method": method, "policy": policy, "dense_top1": 82.8}
    return about | {"latency_ms": {"median": ms}, "dense_latency_ms": {"median": 10.0}} | figures
