"""Random crops, flips and mixtures of pictures, on which recovery compares pruned and unpruned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from edgeprune.records import Preprocessing


class Augmentation(NamedTuple):
    """How pictures are changed at random."""

    least_area: float = 0.35  # of the picture that a crop keeps; 1: no crops
    aspect: float = 4 / 3  # the most by which a crop is stretched
    mixed: float = 1.0  # share of batches whose pictures are mixed in pairs (mixup, arXiv 1710.09412)


def augmented(
    pixels: NDArray[np.uint8], how: Preprocessing, random: np.random.Generator, change: Augmentation
) -> Tensor:
    """Pictures (B, P, P, 3) as the network's input (B, 3, P, P): cropped, flipped, mixed and normalised.

    All randomness is from `random`, so the result does not depend on torch's own generator.
    """
    count = len(pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    grid = affine_grid(torch.from_numpy(crops(count, random, change)), list(images.shape), align_corners=False)
    images = grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    mean = torch.tensor(how.mean)[:, None, None] * 255
    std = torch.tensor(how.std)[:, None, None] * 255
    images = (images - mean) / std
    order, share, mixed = random.permutation(count), random.random(count), random.random() < change.mixed
    if mixed and count > 1:
        part = torch.from_numpy(share.astype(np.float32))[:, None, None, None]
        images = part * images + (1 - part) * images[torch.from_numpy(order)]
    return images


def crops(count: int, random: np.random.Generator, change: Augmentation) -> NDArray[np.float32]:
    """Affine maps (count, 2, 3) from output to input coordinates, both -1 to 1; half of them flip."""
    area = random.uniform(change.least_area, 1, count)
    stretch = np.exp(random.uniform(-1, 1, count) * np.log(change.aspect) / 2)
    width, height = np.minimum(np.sqrt(area) * stretch, 1), np.minimum(np.sqrt(area) / stretch, 1)
    x, y = (random.uniform(-1, 1, count) * (1 - side) for side in (width, height))
    flipped = np.where(random.random(count) < 0.5, -1, 1)
    maps = np.zeros((count, 2, 3), np.float32)
    maps[:, 0, 0], maps[:, 0, 2] = width * flipped, x
    maps[:, 1, 1], maps[:, 1, 2] = height, y
    return maps
