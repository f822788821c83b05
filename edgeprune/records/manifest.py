"""What an ONNX file and a bundle say about themselves."""

from __future__ import annotations

import re

from edgeprune.records.base import SCHEMA, Record, check_task
from edgeprune.records.model import Preprocessing, Vit
from edgeprune.records.report import Recovery, Report
from edgeprune.records.schedule import Engine, Schedule

ENGINE_FILES = ("model.engine", "model.onnx")
FILE_NAME = r"\w[\w.-]*"  # of a file in a bundle: no path, not hidden, cannot be mistaken for an option


class ModelMetadata(Record, frozen=True, kw_only=True):
    """Metadata in an ONNX file: everything that a bundle needs besides the graph."""

    schema: int = SCHEMA
    task: str = "classify"
    vit: Vit
    schedule: Schedule
    preprocessing: Preprocessing
    labels: tuple[str, ...]  # names of the classes; empty for embeddings
    recovery: Recovery | None = None

    def __post_init__(self) -> None:
        check_task(self.task)


class Manifest(Record, frozen=True, kw_only=True):
    """The manifest of a bundle: everything needed to check, run and rebuild it."""

    schema: int = SCHEMA
    task: str = "classify"
    edgeprune: str
    code: str = ""  # hash of the sources that wrote it
    vit: Vit
    engine: Engine
    schedule: Schedule
    report: Report
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    recovery: Recovery | None = None  # None where the weights are those of the model
    files: dict[str, str]  # name in the bundle -> sha256
    tolerance: float  # largest allowed difference between the golden output and a run

    def __post_init__(self) -> None:
        check_task(self.task, self.labels, self.vit.classes)
        if self.engine.path not in ENGINE_FILES:
            raise ValueError(f"the engine is one of {ENGINE_FILES}, not {self.engine.path!r}")
        for name in self.files:
            if not re.fullmatch(FILE_NAME, name):
                raise ValueError(f"{name!r} is not a valid name of a file in a bundle")
