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

TOLERANCE = 0.25


class Source(NamedTuple):
    """Where latencies were published, and how they were measured."""

    where: str
    how: str


ONNXSIM = Source(
    "github.com/onnxsim/onnxsim, scripts/nvidia/README.md (commit 5208cea)",
    "TensorRT 10.3, trtexec's mean GPU time without copies, MAXN_SUPER",
)
AI_LAB = Source(
    "Jetson AI Lab, benchmarks.md, and NVIDIA's blog on the Orin Nano Super",
    "images per second of NVIDIA; precision, batch and what is timed are not stated, taken as fp16 and batch 1",
)
A100_TRT = Source(
    "github.com/bnabis93/vision-language-examples, acceleration/README.md",
    "TensorRT 8.6.1, trtexec, one engine for batch 1 to 64 that is optimised for batch 1",
)
A100_FT = Source(
    "github.com/NVIDIA/FasterTransformer, docs/vit_guide.md (commit 6ea1c77)",
    "FasterTransformer, not TensorRT: cuBLAS, fused attention and fused elementwise kernels, no CUDA graph",
)


class Published(NamedTuple):
    """One latency, ms, and what it is of."""

    source: Source
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
    figures = Simulation(clock_mhz=1410, fma_per_clock_per_sm=rates, bandwidth_gb_per_s=1555, launch_us=LAUNCH_A100)
    a100 = Device(
        name="a100", title="NVIDIA A100", runtime="trt", compute_capability="8.0", sm_count=108, simulation=figures
    )
    return nano, before, a100


LAUNCH_A100 = 1.0  # µs, as in devices/h100.toml


def published() -> list[Published]:
    """All rows of the table."""
    nano, before, a100 = boards()
    base16, base32, base14 = vit(16), vit(32), vit(14)
    rows = [
        Published(ONNXSIM, nano, "ViT-B/16", whole(base16, 1), 1, "tf32", 13.06, fitted=True),
        Published(ONNXSIM, nano, "ViT-B/16", whole(base16, 1), 1, "fp16", 5.59, fitted=True),
        Published(ONNXSIM, nano, "ViT-B/16", whole(base16, 1), 1, "int8", 4.92, fitted=True),
        Published(ONNXSIM, nano, "6 MLPs of ViT-B, 197 rows", mlps(197), 1, "fp16", 1.33),
        Published(ONNXSIM, nano, "6 MLPs of ViT-B, 2048 rows", mlps(2048), 1, "fp16", 12.2),
    ]
    for model, shape, fast, slow in (
        ("ViT-B/16", base16, 158, 98),
        ("ViT-B/32", base32, 273, 171),
        ("CLIP ViT-B/16", base16, 161, 95),
        ("CLIP ViT-B/32", base32, 314, 196),
        ("DINOv2 ViT-B/14", base14, 126, 75),
    ):
        for device, per_s in ((nano, fast), (before, slow)):
            rows.append(Published(AI_LAB, device, model, whole(shape, 1), 1, "fp16", 1e3 / per_s))
    for batch, tf32, fp16 in ((1, 1.695, 1.133), (4, 4.428, 2.165), (8, 7.357, 3.569), (32, 26.751, 12.478)):
        operations = whole(base16, batch)
        rows.append(Published(A100_TRT, a100, "ViT-B/16", operations, batch, "tf32", tf32))
        rows.append(Published(A100_TRT, a100, "ViT-B/16", operations, batch, "fp16", fp16))
    for batch, base, large in ((8, 3.03, 8.09), (16, 5.30, 15.03), (32, 10.04, 29.66)):
        rows.append(Published(A100_FT, a100, "ViT-B/16", whole(base16, batch), batch, "fp16", base))
        rows.append(Published(A100_FT, a100, "ViT-L/16", whole(vit(16, 1024, 24), batch), batch, "fp16", large))
    return rows


def main() -> None:
    for row in published():
        print(
            f"{row.device.name:20} {row.model:28} {row.batch:3} {row.precision:5} {row.published_ms:8.2f} {row.simulated_ms:8.2f} {row.error:+.0%} {'fit' if row.fitted else ''}"
        )


if __name__ == "__main__":
    main()
