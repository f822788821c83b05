"""A folder or CSV of images as preprocessed batches, equal to those of timm's eval transform."""

from __future__ import annotations

import logging
import operator
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from edgeprune.errors import ImageError, InputError
from edgeprune.image_csv import pictures_of_csv
from edgeprune.io import NPY, key_of, replacing, sha256_file
from edgeprune.records import MOST_PX, Preprocessing, Progress, sides_of, silent, text_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
Image.MAX_IMAGE_PIXELS = 1 << 28  # Pillow raises above twice this, before it allocates
MAX_RESIZED_PIXELS = 1 << 26
CALIBRATION_IMAGES = 32
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Pictures in a fixed order; labels (class indices) if every picture has one."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...] | None  # from class folders

    def __len__(self) -> int:
        return len(self.paths)

    def key(self) -> str:
        """Hash of the files' contents and the labels."""
        return key_of([sha256_file(path) for path in self.paths], self.labels)


def image_size(given: str | int | Sequence[int] | None, name: str = "--image-size") -> tuple[int, int] | None:
    """(height, width) from N, "N", "H,W" or (H, W), pixels; None stays None. Raises InputError, which has `name`."""
    if given is None:
        return None
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, Sequence) else [given]
    try:
        sides = [int(part) if isinstance(part, str) else operator.index(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or not 0 < min(sides) <= max(sides) <= MOST_PX:
        raise InputError(f"{name} {given!r}: pass H,W in pixels, or one number for a square, 1 to {MOST_PX} each")
    return sides[0], sides[-1]


def drawn(images: int, count: int) -> NDArray[np.int64]:
    """Sorted indices of `count` of `images` pictures (of all if there are fewer), at random with a fixed seed.

    A smaller choice is part of every larger one.
    """
    return np.sort(np.random.default_rng(0).permutation(images)[:count])


def calibration_indices(images: int) -> NDArray[np.int64]:
    """Indices of the calibration pictures for INT8 in a set of `images`: the same in `build` and `export`."""
    return drawn(images, CALIBRATION_IMAGES)


def load_images(source: Path, option: str = "--images", anywhere: bool = False) -> ImageSet:
    """A CSV `image[,label]`, a folder of class folders, or a folder of loose pictures.

    Class folders are numbered in sorted order of their names; those that cannot be read do not count. `option` is
    named in the advice of an error. The pictures of a CSV are in its folder, or, with `anywhere`, at any path. Raises
    ImageError.
    """
    if os.path.isfile(source):  # unlike Path's own, False for a name that is too long
        return ImageSet(*pictures_of_csv(source, anywhere), None)
    if not os.path.isdir(source):
        raise ImageError(f"{source}: no such folder or CSV: pass {option} DIR or {option} FILE.csv")
    try:
        loose = _pictures(source)
        folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise ImageError(f"{source}: cannot be read ({error.strerror}): check its permissions") from None
    classes = {folder.name: pictures for folder in folders if (pictures := _readable(folder)) is not None}
    if loose:
        if any(classes.values()):
            log.warning(
                "%s has pictures beside its class folders (%s): only these are used, without labels; "
                "remove them to use the class folders", source, loose[0].name,
            )  # fmt: skip
        return ImageSet(loose, None, None)
    if not any(classes.values()):
        raise ImageError(f"{source}: no pictures ({', '.join(SUFFIXES)}) in it or in its class folders")
    for name in classes:
        if (shown := os.fsencode(name).decode(errors="replace")) != name:
            raise ImageError(f"{source}: the name of the class folder {shown!r} is not UTF-8: rename it")
    labels = tuple(label for label, pictures in enumerate(classes.values()) for _ in pictures)
    return ImageSet(tuple(path for pictures in classes.values() for path in pictures), labels, tuple(classes))


def _pictures(folder: Path) -> tuple[Path, ...]:
    found = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return tuple(sorted(p for p in found if p.is_file()))


def _readable(folder: Path) -> tuple[Path, ...] | None:
    """The pictures of a class folder; None, and a warning, where it cannot be read."""
    try:
        return _pictures(folder)
    except OSError as error:
        log.warning("%s cannot be read (%s) and is left out: check its permissions", folder, error.strerror)
        return None


def labelled_for(found: ImageSet, model: str, classes: int, names: Sequence[str] | None) -> ImageSet:
    """The pictures with labels of a classifier with so many `classes`, called `names` where that is known.

    Class folders that are called as its classes are numbered as these. No labels, and a warning, where there is
    another number of folders than of classes, or where their order is not certain. Raises InputError for a label out
    of range.
    """
    labels, folders = found.labels, found.class_names
    if labels is None:
        return found
    if folders is not None and len(folders) != classes and len(used := sorted({*labels})) < len(folders):
        labels, folders = tuple(map(used.index, labels)), tuple(folders[label] for label in used)
        found = ImageSet(found.paths, labels, folders)  # empty folders are no classes
    if folders is not None and names is not None and set(folders) <= set(names):
        return replace(found, labels=tuple(names.index(folders[label]) for label in labels))
    if folders is not None and (why := _no_numbers(folders, model, classes, names or ())):
        log.warning("%s", why)
        return replace(found, labels=None)
    if max(labels) >= classes:
        raise InputError(
            f"label {max(labels)} is out of range: {model} has classes 0 to {classes - 1}: "
            "check the CSV or the weights"
        )
    return found


def _no_numbers(folders: Sequence[str], model: str, classes: int, names: Sequence[str]) -> str | None:
    """Why class folders do not give the numbers of a model's classes, and what to do; None where they do."""
    without = "the pictures are taken without labels"
    if both := set(folders) & set(names):
        others = ", ".join(sorted(set(folders) - both)[:3])
        return (
            f"class folders {others} are not among the classes of {model}, {sorted(both)[0]} are: {without}; "
            "rename the folders for top-1"
        )
    if len(folders) != classes:
        return (
            f"{len(folders)} class folders for a model with {classes} classes: {without}; "
            "pass one folder for each class, or a CSV image,label, for top-1"
        )
    if unlike := differently_sorted(folders):
        return (
            f"torchvision and timm sort class folders such as {unlike[0]} and {unlike[1]} differently: {without}; "
            "name the classes by a CSV image,label for top-1"
        )
    return None


def differently_sorted(folders: Sequence[str]) -> tuple[str, str] | None:
    """Two class folders that torchvision, which sorts them by name, and timm number differently; None without any.

    timm sorts by lower case and by the value of numbers (class_2 before class_10); where two names are equal by that,
    it sorts them by chance.
    """

    def natural(name: str) -> tuple[str | int, ...]:
        parts = re.split(r"(\d+)", name.lower())
        return tuple(int(part) if place % 2 else part for place, part in enumerate(parts))

    plain = sorted(folders)
    pairs = list(zip(plain, sorted(plain, key=natural), strict=True))
    pairs += [(a, b) for a, b in pairwise(plain) if natural(a) == natural(b)]
    return next(((a, b) for a, b in pairs if a != b), None)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits in 8, as PNG readers do it; Pillow's own conversion makes nearly all of them white."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 0xFFFF)
    if image.mode == "I" and values.max(initial=0) <= 0xFF:  # 8 bits stored in 32
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray((values >> 8).astype(np.uint8))


def read_image(path: Path, how: Preprocessing) -> NDArray[np.uint8]:
    """One picture as (H, W, 3) bytes after resizing and centre cropping. Raises ImageError."""
    resample = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "nearest": Image.Resampling.NEAREST,
        "lanczos": Image.Resampling.LANCZOS,
    }[how.interpolation]
    try:
        with Image.open(path) as file:
            image = _in_eight_bits(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not a readable picture ({error}): remove or replace it") from None
    width, height = image.size
    target = resized(width, height, how)
    if target[0] * target[1] > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{path}: {width} x {height} is too narrow to be resized to {text_of(how.resize_px)} px: crop it"
        )
    if target != image.size:
        image = image.resize(target, resample)
    return _centre(np.asarray(image), how.size)


def resized(width: int, height: int, how: Preprocessing) -> tuple[int, int]:
    """(width, height) of a picture before its middle is cropped, rounded as torchvision and timm do."""
    tall, wide = sides_of(how.resize_px)
    if how.crop_mode == "squash":
        return wide, tall
    if tall == wide:  # the shorter side; the longer one is rounded down
        longer = int(wide * max(width, height) / min(width, height))
        return (wide, longer) if width <= height else (longer, wide)
    ratio = min(height / tall, width / wide)
    return round(width / ratio), round(height / ratio)


def _centre(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Centre crop of (H, W, 3) to a (height, width); black where the picture is smaller."""
    for axis, side in enumerate(size):
        missing = side - pixels.shape[axis]
        if missing > 0:
            pad = [(0, 0)] * 3
            pad[axis] = (missing // 2, missing - missing // 2)
            pixels = np.pad(pixels, pad)
    high, wide = size
    top, left = round((pixels.shape[0] - high) / 2.0), round((pixels.shape[1] - wide) / 2.0)
    return pixels[top : top + high, left : left + wide]


def normalise(pixels: NDArray[np.uint8], how: Preprocessing) -> NDArray[np.float32]:
    """(B, H, W, 3) bytes to the network's (B, 3, H, W) fp32 input."""
    mean = np.array(how.mean, np.float32)[:, None, None]
    std = np.array(how.std, np.float32)[:, None, None]
    planes = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((planes - mean) / std)


def decoded(paths: Sequence[Path], how: Preprocessing, progress: Progress = silent) -> Iterator[NDArray[np.uint8]]:
    """Pictures one after another, (H, W, 3) bytes each. Raises ImageError."""
    for done, path in enumerate(paths):
        progress("decoding images", done, len(paths))
        yield read_image(path, how)
    progress("decoding images", len(paths), len(paths))


def load_pixels(paths: Sequence[Path], how: Preprocessing, progress: Progress = silent) -> NDArray[np.uint8]:
    """All pictures as (images, H, W, 3) bytes: 150 kB an image at 224 px. Raises ImageError."""
    pixels = np.empty((len(paths), *how.size, 3), np.uint8)
    for place, picture in enumerate(decoded(paths, how, progress)):
        pixels[place] = picture
    return pixels


def save_pixels(paths: Sequence[Path], how: Preprocessing, out: Path, progress: Progress = silent) -> None:
    """Write what `load_pixels` returns as .npy, atomically and picture by picture. Raises ImageError, OutputError."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *how.size, 3)}
    with replacing(out) as temporary, open(temporary, "wb") as file:
        NPY.write_array_header_1_0(file, header)
        for picture in decoded(paths, how, progress):
            file.write(np.ascontiguousarray(picture).data)


def batches(pixels: NDArray[np.uint8], how: Preprocessing, batch: int) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Batches (batch, 3, H, W) of equal size, each with its number of real pictures; the last picture is repeated."""
    for start in range(0, len(pixels), batch):
        piece = pixels[start : start + batch]
        real = len(piece)
        if real < batch:
            piece = np.concatenate([piece, np.repeat(piece[-1:], batch - real, axis=0)])
        yield normalise(piece, how), real
