"""The simulation's latencies compared with published ones.

python benchmarks/simulation.py
Needs no hardware, takes a second. Prints the table of docs/benchmarks.md and one JSON line last.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import msgspec

from edgeprune import devices
from edgeprune.onnx_graph.operations import Matmul, Operation
from edgeprune.records import Device, Simulation, Vit
from edgeprune.runtimes.kernel_times import latency_ms
from edgeprune.runtimes.simulated import operations_of_ends, operations_of_trunk

LAUNCH_A100_US = 1.5  # as in devices/h100.toml
# 5.4 TB/s on 108 SMs at 1410 MHz: github.com/te42kyfo/gpu-benches, gpu-l2-cache/a100_80.txt, commit 3088b33
L2_A100 = 35.5


ONNXSIM = "onnxsim"  # github.com/onnxsim/onnxsim, scripts/nvidia/README.md, commit 5208cea
AI_LAB = "Jetson AI Lab"  # jetson-ai-lab.com/archive/benchmarks.html, images per second
A100_TRT = "bnabis93"  # github.com/bnabis93/vision-language-examples, acceleration/README.md, commit 3982327
A100_FT = "FasterTransformer"  # github.com/NVIDIA/FasterTransformer, docs/vit_guide.md, commit 6ea1c77


class Published(NamedTuple):
    """One latency, ms, and what it is of."""

    source: str
    device: Device
    model: str
    operations: list[Operation]
    batch: int
    precision: str
    published_ms: float
    fitted: bool = False

    @property
    def simulated_ms(self) -> float:
        """By the tail-effect model."""
        return latency_ms(self.operations, self.device, self.precision)

    @property
    def error(self) -> float:
        """Simulated over published, less 1."""
        return self.simulated_ms / self.published_ms - 1


def vit(patch_px: int, width: int = 768, depth: int = 12, image_px: int = 224, classes: int = 1000) -> Vit:
    """A ViT with heads of 64 and a CLS token."""
    tokens = (image_px // patch_px) ** 2 + 1
    return Vit(
        name="vit", weights_sha256="0" * 64, family="vit", image_px=image_px, patch_px=patch_px, depth=depth,
        width=width, heads=width // 64, head_dim=64, mlp_width=4 * width, prefix=1, tokens=tokens, classes=classes,
        prefix_pooled=True,
    )  # fmt: skip


def whole(shape: Vit, batch: int) -> list[Operation]:
    """All kernels of an unpruned model."""
    return operations_of_ends(shape, batch) + operations_of_trunk(shape, shape.tokens, batch)


def mlps(rows: int) -> list[Operation]:
    """Six MLPs of ViT-B with ReLU, one after another, without norm or residual."""
    return [Matmul(rows, 3072, 768), Matmul(rows, 768, 3072)] * 6


def boards() -> tuple[Device, Device, Device]:
    """The Orin Nano Super, the same before Super, and an A100, which is no device of edgeprune."""
    nano = devices.load_device("orin-nano")
    assert nano.simulation is not None
    slower = msgspec.structs.replace(nano.simulation, clock_mhz=625, bandwidth_gb_per_s=68)
    before = msgspec.structs.replace(nano, name="orin-nano, 625 MHz", simulation=slower)
    rates = {"fp32": 64, "tf32": 512, "fp16": 1024, "int8": 2048}  # "NVIDIA A100 Tensor Core GPU" data sheet, dense
    figures = Simulation(
        clock_mhz=1410, fma_per_clock_per_sm=rates, bandwidth_gb_per_s=1555, launch_us=LAUNCH_A100_US,
        l2_bytes_per_clock_per_sm=L2_A100,
    )  # fmt: skip
    a100 = Device(
        name="a100", title="NVIDIA A100", runtime="trt", compute_capability="8.0", sm_count=108, simulation=figures
    )
    return nano, before, a100


def published() -> list[Published]:
    """All rows of the table; those with `fitted` guided the constants of kernel_times.py, which are set by hand."""
    nano, before, a100 = boards()
    base16, base32, base14, large = vit(16), vit(32), vit(14), vit(16, 1024, 24)
    rows = [
        Published(ONNXSIM, nano, "ViT-B/16", whole(base16, 1), 1, "tf32", 13.06, fitted=True),
        Published(ONNXSIM, nano, "ViT-B/16", whole(base16, 1), 1, "fp16", 5.59, fitted=True),
        Published(ONNXSIM, nano, "ViT-B/16", whole(base16, 1), 1, "int8", 4.92, fitted=True),
        Published(ONNXSIM, nano, "6 MLPs of ViT-B, 197 rows", mlps(197), 1, "fp16", 1.33),
        Published(ONNXSIM, nano, "6 MLPs of ViT-B, 2048 rows", mlps(2048), 1, "fp16", 12.2),
    ]
    for model, shape, per_s, per_s_before in (
        ("ViT-B/32", base32, 273, 171),
        ("CLIP ViT-B/32", base32, 314, 196),
        ("ViT-B/16", base16, 158, 98),
        ("CLIP ViT-B/16", base16, 161, 95),
        ("DINOv2 ViT-B/14", base14, 126, 75),
    ):
        for device, images in ((nano, per_s), (before, per_s_before)):
            fitted = (model, device) == ("ViT-B/32", nano)
            rows.append(Published(AI_LAB, device, model, whole(shape, 1), 1, "fp16", 1e3 / images, fitted))
    for batch, of_base, of_large in ((1, 1.53, 2.97), (8, 3.03, 8.09), (16, 5.30, 15.03), (32, 10.04, 29.66)):
        rows.append(Published(A100_FT, a100, "ViT-B/16", whole(base16, batch), batch, "fp16", of_base))
        rows.append(Published(A100_FT, a100, "ViT-L/16", whole(large, batch), batch, "fp16", of_large))
    for precision, times in (
        ("tf32", {1: 1.695, 4: 4.428, 8: 7.357, 16: 13.899, 32: 26.751}),
        ("fp16", {1: 1.133, 4: 2.165, 8: 3.569, 16: 6.392, 32: 12.478}),
    ):
        for batch, ms in times.items():
            rows.append(Published(A100_TRT, a100, "ViT-B/16", whole(base16, batch), batch, precision, ms))
    return rows


def table(rows: list[Published]) -> str:
    """The rows in Markdown."""
    lines = ["| source | device | model | batch | precision | published, ms | simulated, ms | error | |", HEAD]
    lines += [
        f"| {row.source} | {row.device.name} | {row.model} | {row.batch} | {row.precision} | "
        f"{row.published_ms:.2f} | {row.simulated_ms:.2f} | {row.error:+.0%} | "
        f"{'fitted' if row.fitted else 'not fitted'} |"
        for row in rows
    ]
    return "\n".join(lines)


HEAD = "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | --- |"


def main() -> None:
    """Print."""
    rows = published()
    print(table(rows))
    shown = ("source", "model", "batch", "precision", "published_ms", "fitted")
    found = [
        {"device": row.device.name, "simulated_ms": row.simulated_ms, "error": row.error}
        | {name: getattr(row, name) for name in shown}
        for row in rows
    ]
    print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
