"""A CSV `image[,label]`: paths of pictures, and class indices."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path

from edgeprune.errors import ImageError

MAX_CSV_BYTES = 256 << 20
log = logging.getLogger(__name__)


def pictures_of_csv(source: Path, anywhere: bool) -> tuple[tuple[Path, ...], tuple[int, ...] | None]:
    """The paths in a CSV, and a label for each where it has the column `label`.

    Without `anywhere`, paths have to lie in the folder of the CSV; links in it may lead elsewhere. Raises ImageError.
    """
    if source.stat().st_size > MAX_CSV_BYTES:
        raise ImageError(f"{source}: is larger than {MAX_CSV_BYTES >> 20} MiB: split it into smaller CSV files")
    paths: list[Path] = []
    labels: list[int] = []
    base = source.parent.resolve()
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            if "image" not in columns:
                raise ImageError(f"{source}: the first line is not a header: make it `image` or `image,label`")
            reader.fieldnames = columns
            for row in reader:
                where = f"{source}:{reader.line_num}"
                path = Path(os.path.normpath(base / (row["image"] or "")))
                if not anywhere and not path.is_relative_to(base) and not path.resolve().is_relative_to(base):
                    raise ImageError(
                        f"{where}: {row['image']} is outside {base.name}/: use paths inside the folder of the CSV"
                    )
                if not os.path.isfile(path):
                    raise ImageError(f"{where}: {row['image']} does not exist: paths are relative to the CSV")
                paths.append(path)
                if "label" in columns:
                    labels.append(_label(row["label"], where))
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ImageError(f"{source}: not a CSV in UTF-8 ({error}): write `image,label` lines") from None
    except OSError as error:
        raise ImageError(f"{source}: cannot be read ({error.strerror}): check the path") from None
    if not paths:
        raise ImageError(f"{source}: no images in it: write `image,label` lines")
    if "label" not in columns and len(columns) > 1:
        log.warning(
            "%s has no column `label`, only %s: the pictures are taken without labels; "
            "call the column with the class index `label` for top-1", source, ", ".join(columns),
        )  # fmt: skip
    return tuple(paths), tuple(labels) or None


def _label(text: str | None, where: str) -> int:
    if text is None or not text.strip().isdecimal() or len(text) > 9:
        raise ImageError(f"{where}: label {text!r} is not a class index: use whole numbers from 0")
    return int(text)
