"""Train `vit_digits` on scikit-learn's scanned digits and write its weights, record and held-out images."""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from edgeprune.io import save as save_record
from edgeprune.vit.models import load_model
from edgeprune.zoo import EMBEDDED, WEIGHTS, images_dir, vit_digits

Array = np.ndarray[Any, Any]
SEED = 0
SIZE = 28  # pixels
BATCH = 48
MAX_SHIFT = 3  # pixels
PATCH_DROP = 0.6  # share of patch tokens dropped while training; without it this ViT trains badly


def load_split() -> tuple[Array, Array, Array, Array]:
    """Images (1797, 28, 28) uint8, labels (1797,), and the indices of the training and held-out images."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise SystemExit("train_digits needs scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)  # scans hold 0..16
    scaled = [Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for scan in grey]
    images = np.stack([np.asarray(image) for image in scaled])
    labels = data.target.astype(np.int64)
    index = np.arange(len(labels))
    train, held = train_test_split(index, test_size=0.25, stratify=labels, random_state=SEED)
    return images, labels, np.sort(train), np.sort(held)


def write_images(folder: Path, images: Array, labels: Array, held: Array) -> None:
    """Write images[held] as greyscale PNG files under folder/images and their list as folder/labels.csv."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", "label"])
        for index in held:
            name = f"images/{labels[index]}_{index}.png"
            Image.fromarray(images[index]).save(folder / name, optimize=True)
            rows.writerow([name, labels[index]])


def normalise(grey: torch.Tensor) -> torch.Tensor:
    """(B, 28, 28) uint8 -> (B, 3, 28, 28) float in -1..1 (mean and std 0.5)."""
    return ((grey.float() / 255 - 0.5) / 0.5).unsqueeze(1).repeat(1, 3, 1, 1)


def shift(grey: torch.Tensor) -> torch.Tensor:
    """Move every image of (B, 28, 28) by its own random -3..3 pixels on both axes; black comes in."""
    padded = F.pad(grey, (MAX_SHIFT,) * 4)
    span = torch.arange(SIZE)
    rows = torch.randint(0, 2 * MAX_SHIFT + 1, (len(grey), 1)) + span
    cols = torch.randint(0, 2 * MAX_SHIFT + 1, (len(grey), 1)) + span
    return padded[torch.arange(len(grey))[:, None, None], rows[:, :, None], cols[:, None, :]]


def train_model(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> dict[str, torch.Tensor]:
    """Train on (N, 28, 28) uint8 images with (N,) labels; returns the fp32 weights of the last epoch."""
    from timm.layers.patch_dropout import PatchDropout

    torch.manual_seed(SEED)
    model = vit_digits().train()
    model.patch_drop = PatchDropout(PATCH_DROP, num_prefix_tokens=1)  # has no weights, idle in eval mode
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # timm's std 0.02 is too small a start at width 64
            torch.nn.init.xavier_uniform_(module.weight)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, epochs * steps, pct_start=0.1)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.split(torch.randperm(len(images)), BATCH):
            logits = model(normalise(shift(images[batch])))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}/{epochs} loss {total / len(images):.4f}", flush=True)
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def evaluate(weights: Path, folder: Path) -> tuple[int, int]:
    """(correct, total) of the stored weights on the PNG files that folder/labels.csv lists."""
    from safetensors.torch import load_file

    model = vit_digits()
    model.load_state_dict(load_file(weights), strict=True)
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    grey = torch.from_numpy(np.stack([np.array(Image.open(folder / row["image"])) for row in rows]))
    with torch.inference_mode():
        found = torch.cat([model(normalise(part)).argmax(1) for part in torch.split(grey, 64)])
    return sum(int(f) == int(row["label"]) for f, row in zip(found, rows, strict=True)), len(rows)


def main() -> None:
    """Train, save, and print the held-out accuracy of what was saved as a last line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the weights and digits/ (default: in place)")
    parser.add_argument("--epochs", type=int, default=80)
    args = parser.parse_args()
    weights = args.out / WEIGHTS.name if args.out else WEIGHTS
    folder = args.out / "digits" if args.out else images_dir()

    from safetensors.torch import save

    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    images, labels, train, held = load_split()
    write_images(folder, images, labels, held)
    start = time.perf_counter()
    state = train_model(torch.from_numpy(images[train]), torch.from_numpy(labels[train]), args.epochs)
    seconds = time.perf_counter() - start
    weights.write_bytes(save(state))
    save_record(load_model(EMBEDDED, str(weights)).vit, weights.with_suffix(".json"))
    correct, total = evaluate(weights, folder)
    report = {"accuracy": correct / total, "correct": correct, "held_out": total}
    report |= {"epochs": args.epochs, "seed": SEED, "train_seconds": round(seconds, 1)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
