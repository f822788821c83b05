"""What a build imports, for the process that others are forked from; the exporter imports much when it first runs.

It computes with one thread (support.builds), so no thread is left that a fork would miss.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch

import edgeprune.pipeline.build
from edgeprune.vit.export import onnx_from_module
from support import exports
from support.processes import measure_few

assert torch.get_num_threads() == 1, "OMP_NUM_THREADS=1 is set by tests/conftest.py"
with tempfile.TemporaryDirectory() as _folder:
    onnx_from_module(torch.nn.Linear(2, 2), torch.zeros(1, 2), Path(_folder, "model.onnx"))

exports.share()
measure_few()

__all__ = ["edgeprune", "onnxruntime", "timm"]
