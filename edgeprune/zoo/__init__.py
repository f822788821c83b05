"""The embedded default model `vit_digits` (weights, class names, held-out images)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

EMBEDDED = "vit_digits"
WEIGHTS: Path = Path(__file__).resolve().parent / "vit_digits.safetensors"
RECORD: Path = WEIGHTS.with_suffix(".json")  # its Vit record, so that simulation needs no torch
CLASS_NAMES: tuple[str, ...] = tuple(str(digit) for digit in range(10))


def _pretrained_cfg() -> dict[str, Any]:
    """The data configuration in timm's format; input_size is (channels, height, width) in pixels."""
    return {
        "architecture": EMBEDDED,
        "input_size": (3, 28, 28),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "num_classes": len(CLASS_NAMES),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def vit_digits() -> VisionTransformer:
    """Untrained ViT, eval mode: (B, 3, 28, 28) -> (B, 10) logits; 197 tokens (CLS + 14 x 14) of width 64."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=28, patch_size=2, in_chans=3, num_classes=len(CLASS_NAMES),
        embed_dim=64, depth=12, num_heads=4, mlp_ratio=2,
    )  # fmt: skip
    vars(model).update(pretrained_cfg=_pretrained_cfg(), default_cfg=_pretrained_cfg())
    return model.eval()


def images_dir() -> Path:
    """The folder with labels.csv and images/: in an installed package, else calib/digits of the checkout."""
    packaged = Path(__file__).resolve().parent / "digits"
    if packaged.is_dir():
        return packaged
    return Path(__file__).resolve().parents[2] / "calib" / "digits"
