"""The base of all records, the limits of what a file may say, and the checks that several records share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

SCHEMA = 1
# Above all real models and pictures: files are untrusted, and memory is allocated for the sizes in them.
MOST = 1e12  # for any figure
MOST_PX, MOST_UNITS, MOST_BLOCKS, MOST_CLASSES = 1 << 13, 1 << 17, 1 << 10, 1 << 20
TASKS = ("classify", "embed", "dense")  # what the output of a model is for (tasks.py)


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: immutable, keyword-only, unknown fields refused."""


def check_figures(values: Iterable[float | None], least: float = 1e-9) -> None:
    """Raise ValueError unless every value that is not None is between `least` and MOST: files are untrusted."""
    for value in values:
        if value is not None and not least <= value <= MOST:
            raise ValueError(f"{value} is not within {least:g} to {MOST:g}")


def check_task(task: str, labels: Sequence[str] | None = None, classes: int = 0) -> None:
    """Raise ValueError for an unknown task, or where `labels` do not name `classes` classes (none for embeddings)."""
    if task not in TASKS:
        raise ValueError(f"the task is one of {TASKS}, not {task!r}")
    classes = classes if task == "classify" else 0
    if labels is not None and len(labels) != classes:
        raise ValueError(f"{len(labels)} labels for {classes} classes")
