"""Images: bit-near timm's own eval transform, and folders and CSV files good and bad."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.errors import ImageError, InputError
from edgeprune.images import (
    ImageSet,
    batches,
    calibration_indices,
    differently_sorted,
    drawn,
    labelled_for,
    load_images,
    load_pixels,
    normalise,
    read_image,
    save_pixels,
)
from edgeprune.records import Pixels, Preprocessing, sides_of

HOW = Preprocessing(
    image_px=8, resize_px=8, interpolation="nearest", crop_mode="center", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> Path:
    """A random but smooth picture of `size` (width, height) in a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


@pytest.mark.parametrize("size", [(224, 224), (227, 227), (500, 375), (301, 480), (64, 97), (248, 250), (20, 400)])
@pytest.mark.parametrize(
    ("interpolation", "crop_pct", "crop_mode", "image_px"),
    [
        ("bicubic", 0.9, "center", 224),
        ("bicubic", 1.0, "center", 28),
        ("bilinear", 0.875, "center", 96),
        ("bicubic", 0.95, "squash", 96),
        ("bicubic", 1.3, "center", 97),  # the crop is larger than what was resized: black edges
        ("bicubic", 0.9, "center", (96, 160)),
        ("bilinear", 0.95, "squash", (112, 64)),
    ],
)
def test_equals_timm(
    interpolation: str, crop_pct: float, crop_mode: str, image_px: Pixels, size: tuple[int, int], tmp_path: Path
) -> None:
    from timm.data import create_transform, resolve_model_data_config

    from edgeprune.vit.models import _preprocessing

    config = {
        "input_size": (3, *sides_of(image_px)),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    module: Any = SimpleNamespace(pretrained_cfg=config)
    path = picture(tmp_path / "picture.png", size)
    wanted = create_transform(**resolve_model_data_config(module))(Image.open(path)).numpy()
    how = _preprocessing(module, SimpleNamespace(image_px=image_px), None, {})  # type: ignore[arg-type]
    found = normalise(read_image(path, how)[None], how)[0]
    assert found.dtype == np.float32 and found.shape == (3, *sides_of(image_px))
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "webp"), ("CMYK", "jpg")])
def test_other_colour_modes_are_read_as_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    path = picture(tmp_path / f"picture.{suffix}", mode=mode)
    np.testing.assert_array_equal(read_image(path, HOW), np.asarray(Image.open(path).convert("RGB")))


def write_csv(folder: Path, text: str | bytes) -> Path:
    for name in ("a.png", "sub/b.png", "c.png"):
        picture(folder / name)
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("image,label\na.png,3\nsub/b.png, 0\n", (3, 0)),
        ("\ufeffimage,label\r\na.png,3\r\nsub/b.png,0\r\n", (3, 0)),
        ("label,other,image\n3,x,a.png\n0,,sub/b.png\n", (3, 0)),
        ('image\n"a.png"\nsub/../sub/b.png', None),
        ("Image, Label \na.png,3\nsub/b.png,0\n", (3, 0)),
    ],
)
def test_csv(text: str, labels: tuple[int, ...] | None, tmp_path: Path) -> None:
    found = load_images(write_csv(tmp_path, text))
    assert [p.relative_to(tmp_path.resolve()) for p in found.paths] == [Path("a.png"), Path("sub/b.png")]
    assert (found.labels, found.class_names, len(found)) == (labels, None, 2)


def test_a_column_that_may_be_meant_as_labels_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_images(write_csv(tmp_path, "image,class\na.png,3\n")).labels is None
    assert "has no column `label`, only image, class: the pictures are taken without labels" in caplog.text
    caplog.clear()
    load_images(write_csv(tmp_path, "image\na.png\n"))
    assert not caplog.records


def test_links_of_a_csv_may_lead_elsewhere(tmp_path: Path) -> None:
    """As those of DVC, git-annex and snapshots of Hugging Face do; a path out of the folder is refused as before."""
    stored = picture(tmp_path / "store" / "1234.png")
    path = write_csv(tmp_path / "set", f"image\nsub/link.png\n{tmp_path}/set/a.png\n")
    (tmp_path / "set" / "sub" / "link.png").symlink_to(stored)
    assert load_images(path).paths == (tmp_path / "set" / "sub" / "link.png", tmp_path / "set" / "a.png")
    (tmp_path / "alias").symlink_to(tmp_path / "set")
    assert len(load_images(tmp_path / "alias" / "labels.csv")) == 2
    path.write_text("image\nsub/../../store/1234.png\n")
    with pytest.raises(ImageError, match="is outside"):
        load_images(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image,label\na.png,cat\n", r"labels\.csv:2: label 'cat' is not a class index"),
        ("image,label\na.png,1\nc.png,-1\n", r"labels\.csv:3: label '-1'"),
        ("image,label\na.png,1\nc.png,\n", r"labels\.csv:3: label ''"),
        ("image,label\na.png,1\nc.png\n", r"labels\.csv:3: label None"),
        ("image,label\na.png,1.5\n", "label '1.5'"),
        ("image,label\na.png,9999999999\n", "label '9999999999'"),
        ("image\na.png\nabsent.png\n", r"labels\.csv:3: absent\.png does not exist: paths are relative"),
        ("image\n../x.png\n", r"labels\.csv:2: \.\./x\.png is outside"),
        ("image\n/etc/passwd\n", "is outside"),
        ("image\nsub\n", "sub does not exist"),
        ("image,label\n,1\n", "does not exist"),
        ("image\n" + 300 * "x" + ".png\n", "x.png does not exist"),
        ("image\na\0.png\n", "labels.csv"),
        ("path,label\na.png,1\n", "the first line is not a header: make it `image` or `image,label`"),
        ("", "the first line is not a header"),
        ("image,label\n", "no images in it"),
        (b"image\n\xff\xfe.png\n", "not a CSV in UTF-8"),
    ],
)
def test_bad_csv(text: str | bytes, reason: str, tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    with pytest.raises(ImageError, match=reason):
        load_images(write_csv(tmp_path / "folder", text))


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    for name in ("dog/2.jpg", "dog/1.JPG", "cat/9.png", ".hidden/1.png", "dog/._2.jpg", "._x.jpg", "dog/notes.txt"):
        picture(tmp_path / name) if name[-3:] != "txt" else (tmp_path / name).write_text("no picture")
    (tmp_path / "bee").mkdir()  # a class of which there are no pictures here, or no class
    found = load_images(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in found.paths] == ["cat/9.png", "dog/1.JPG", "dog/2.jpg"]
    assert found.labels == (1, 2, 2) and found.class_names == ("bee", "cat", "dog")
    assert labelled_for(found, "m", 3, None) is found
    fewer = labelled_for(found, "m", 2, None)
    assert fewer.labels == (0, 1, 1) and fewer.class_names == ("cat", "dog")
    assert labelled_for(found, "m", 4, ("x", "dog", "cat", "y")).labels == (2, 1, 1)


def test_folders_that_cannot_be_read_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat/1.png", "lost+found/1.png"):
        picture(tmp_path / name)
    listed, closed = Path.iterdir, {"lost+found"}

    def iterdir(folder: Path) -> Any:
        if folder.name in closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert load_images(tmp_path).class_names == ("cat",)
    assert "lost+found cannot be read (Permission denied) and is left out" in caplog.text
    closed.add(tmp_path.name)
    with pytest.raises(ImageError, match=r"cannot be read \(Permission denied\): check its permissions"):
        load_images(tmp_path)


def test_a_class_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    [folder] = tmp_path.iterdir()
    picture(tmp_path / "a.png").rename(folder / "a.png")
    with pytest.raises(ImageError, match="the name of the class folder 'caf\ufffd' is not UTF-8: rename it"):
        load_images(tmp_path)


def test_loose_pictures_have_no_labels(tmp_path: Path) -> None:
    for name in ("b.bmp", "a.tif", "c.ppm"):
        picture(tmp_path / name)
    found = load_images(tmp_path)
    assert [p.name for p in found.paths] == ["a.tif", "b.bmp", "c.ppm"]
    assert found.labels is None and found.class_names is None


def test_a_loose_picture_that_hides_class_folders_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("x.png", "cat/1.png", "dog/1.png"):
        picture(tmp_path / name)
    assert [p.name for p in load_images(tmp_path).paths] == ["x.png"]
    assert "pictures beside its class folders (x.png)" in caplog.text and len(caplog.records) == 1


def folders(*names: str) -> ImageSet:
    """A picture in each of some class folders."""
    return ImageSet(tuple(Path(name) for name in names), tuple(range(len(names))), names)


@pytest.mark.parametrize(
    "names",
    [
        "cat dog",
        "class_1 class_2 class_10",
        "class_01 class_02 class_10",
        "Zebra apple",
        "Apple Zebra",
        "n01 n02 n10",
    ],
)
def test_orders_of_torchvision_and_timm(names: str) -> None:
    from timm.utils.misc import natural_key

    classes = names.split()
    same = sorted(classes) == sorted(classes, key=natural_key)
    assert (differently_sorted(classes) is None) is same
    assert differently_sorted(["a1", "a01"]) == ("a01", "a1"), "timm takes these as they come"
    assert differently_sorted(["²", "a"]) is None


def test_class_folders_without_a_certain_order_give_no_labels(caplog: pytest.LogCaptureFixture) -> None:
    unsure = folders("class_1", "class_10", "class_2")
    assert labelled_for(unsure, "m", 3, ("class_10", "class_2", "class_1")).labels == (2, 0, 1)
    assert labelled_for(unsure, "m", 3, ("x", "class_3", "y")).labels is None
    assert len(caplog.records) == 1 and "class_10 and class_2 differently" in caplog.text
    numbers = [str(index) for index in range(11)]
    assert labelled_for(folders(*sorted(numbers)), "m", 11, numbers).labels == (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)
    assert labelled_for(folders("3", "5"), "digits", 10, numbers[:10]).labels == (3, 5)
    assert caplog.records[0].getMessage().endswith("name the classes by a CSV image,label for top-1")


def test_class_folders_get_the_numbers_of_the_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    """By name where these are its names, else in sorted order, and only one for each class."""
    assert labelled_for(folders("cat", "dog", "emu"), "m", 3, ("emu", "cat", "dog")).labels == (1, 2, 0)
    assert labelled_for(folders("cat", "emu"), "m", 3, ("emu", "cat", "dog")).labels == (1, 0)
    for names in (("x", "y"), None):
        assert labelled_for(folders("cat", "dog"), "m", 2, names).labels == (0, 1)
    assert not caplog.records
    assert labelled_for(folders("cat", "dog"), "m", 10, None).labels is None
    assert "2 class folders for a model with 10 classes: the pictures are taken without" in caplog.text
    assert labelled_for(folders("cat", "Dog"), "m", 2, ("dog", "cat")).labels is None, "not numbered by the alphabet"
    assert "class folders Dog are not among the classes of m, cat are" in caplog.text
    numbered = ImageSet((Path("a"),), (7,), None)
    assert labelled_for(numbered, "m", 8, None) is numbered
    with pytest.raises(InputError, match="label 7 is out of range: m has classes 0 to 6"):
        labelled_for(numbered, "m", 7, None)


@pytest.mark.parametrize(("kind", "suffix"), [("uint16", "png"), ("uint16", "tif"), ("int32", "tif")])
def test_grey_of_16_bits(kind: str, suffix: str, tmp_path: Path) -> None:
    values = (np.arange(64, dtype=np.int64).reshape(8, 8) * 1040).astype(kind)
    Image.fromarray(values).save(path := tmp_path / f"grey.{suffix}")
    np.testing.assert_array_equal(read_image(path, HOW), np.repeat((values >> 8)[..., None], 3, axis=2))


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no pictures"):
        load_images(tmp_path)
    (tmp_path / "empty-class").mkdir()
    with pytest.raises(ImageError, match="no pictures"):
        load_images(tmp_path)
    for absent in ("absent", 300 * "x"):
        with pytest.raises(ImageError, match="no such folder or CSV"):
            load_images(tmp_path / absent)


def broken(path: Path, kind: str) -> Path:
    if kind == "truncated":
        whole = picture(path.with_suffix(".jpg"), (64, 64)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes({"text": b"not a picture", "empty": b""}[kind])
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_unreadable_picture_is_named(kind: str, tmp_path: Path) -> None:
    path = broken(tmp_path / "bad.png", kind)
    with pytest.raises(ImageError, match=r"bad\.png: not a readable picture .*: remove or replace it"):
        load_pixels([picture(tmp_path / "good.png"), path], HOW)
    with pytest.raises(ImageError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png", HOW)


def test_pixels_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{index}.png", (30, 12 + index), seed=index) for index in range(3)]
    save_pixels(paths, HOW, tmp_path / "pixels.npy")
    np.save(tmp_path / "whole.npy", np.stack([read_image(path, HOW) for path in paths]))
    assert (tmp_path / "pixels.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    np.testing.assert_array_equal(load_pixels(paths, HOW), np.load(tmp_path / "pixels.npy"))
    with pytest.raises(ImageError, match=r"broken\.png"):
        save_pixels([*paths, broken(tmp_path / "broken.png", "text")], HOW, tmp_path / "none.npy")
    assert not list(tmp_path.glob("*none*")) and not list(tmp_path.glob(".*"))


def test_normalise() -> None:
    pixels = np.zeros((2, 1, 1, 3), np.uint8)
    pixels[1] = 255
    found = normalise(pixels, HOW)
    assert found.shape == (2, 3, 1, 1) and found.flags.c_contiguous
    np.testing.assert_allclose(found[:, :, 0, 0], [[-2.5, -4 / 3, -0.75], [2.5, 2.0, 1.75]], rtol=1e-6)


@pytest.mark.parametrize(("count", "batch", "real"), [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (1, 3, [1]), (0, 2, [])])
def test_batches_are_whole_and_say_how_many_are_real(count: int, batch: int, real: Sequence[int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    found = list(batches(pixels, HOW, batch))
    assert [n for _, n in found] == real
    assert all(images.shape == (batch, 3, 8, 8) for images, _ in found)
    if count:
        np.testing.assert_array_equal(np.concatenate([images[:n] for images, n in found]), normalise(pixels, HOW))


def test_drawn_pictures_span_the_set_and_lie_in_larger_choices() -> None:
    chosen = calibration_indices(650)
    assert len(chosen) == len({*chosen.tolist()}) == 32 and chosen.tolist() == sorted(chosen.tolist())
    assert np.bincount(chosen // 130, minlength=5).min() >= 2, "five classes of 130 pictures, each has its share"
    assert set(chosen.tolist()) < set(drawn(650, 128).tolist())
    assert drawn(30, 30).tolist() == drawn(30, 99).tolist() == list(range(30))


def test_key_follows_contents_and_labels(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "image,label\na.png,1\nc.png,2\n")
    keys = [load_images(path).key(), load_images(path).key()]
    path.write_text("image,label\na.png,1\nc.png,3\n")
    keys.append(load_images(path).key())
    picture(tmp_path / "a.png", seed=1)
    keys.append(load_images(path).key())
    assert keys[0] == keys[1] and len(set(keys)) == 3
