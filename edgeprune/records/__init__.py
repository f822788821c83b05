"""Frozen records that are passed from step to step; io.py loads and saves them.

Units are in the names. `tokens` always counts every token that a block passes on, including the prefix (CLS,
distillation, registers) and any fused or mean token. This holds everywhere, from the profiler to the ONNX shapes.
"""

from __future__ import annotations

from edgeprune.records.base import (
    MOST,
    MOST_BLOCKS,
    MOST_CLASSES,
    MOST_PX,
    MOST_UNITS,
    SCHEMA,
    TASKS,
    Record,
    check_figures,
    check_task,
)
from edgeprune.records.device import Device, Simulation, TrtOptions
from edgeprune.records.fidelity import ClassFidelity, DenseFidelity, EmbedFidelity, Fidelity, LayerFidelity
from edgeprune.records.latency import Conditions, GpuState, Latency, Setup
from edgeprune.records.manifest import ENGINE_FILES, FILE_NAME, Manifest, ModelMetadata
from edgeprune.records.model import (
    CROP_MODES,
    INTERPOLATIONS,
    Output,
    Pixels,
    Preprocessing,
    Vit,
    check_pixels,
    pixels_of,
    sides_of,
    text_of,
)
from edgeprune.records.progress import Progress, silent
from edgeprune.records.report import PrecisionResult, Recovery, Report, Unrecovered
from edgeprune.records.schedule import Engine, Int8Ranges, Schedule, check_tokens
from edgeprune.records.staircase import CutCost, DepthCheck, LastShare, Point, Staircase
from edgeprune.records.trace import BuildTrace, Candidate, Sample, Trial

__all__ = [
    "CROP_MODES",
    "ENGINE_FILES",
    "FILE_NAME",
    "INTERPOLATIONS",
    "MOST",
    "MOST_BLOCKS",
    "MOST_CLASSES",
    "MOST_PX",
    "MOST_UNITS",
    "SCHEMA",
    "TASKS",
    "BuildTrace",
    "Candidate",
    "ClassFidelity",
    "Conditions",
    "CutCost",
    "DenseFidelity",
    "DepthCheck",
    "Device",
    "EmbedFidelity",
    "Engine",
    "Fidelity",
    "GpuState",
    "Int8Ranges",
    "LastShare",
    "Latency",
    "LayerFidelity",
    "Manifest",
    "ModelMetadata",
    "Output",
    "Pixels",
    "Point",
    "PrecisionResult",
    "Preprocessing",
    "Progress",
    "Record",
    "Recovery",
    "Report",
    "Sample",
    "Schedule",
    "Setup",
    "Simulation",
    "Staircase",
    "Trial",
    "TrtOptions",
    "Unrecovered",
    "Vit",
    "check_figures",
    "check_pixels",
    "check_task",
    "check_tokens",
    "pixels_of",
    "sides_of",
    "silent",
    "text_of",
]
