"""The tree of errors a user can see; each message is one line that ends with what to do.

EdgepruneError
├── InputError          a file or an option that cannot be used
│   ├── ModelError      an unknown model, not a Vision Transformer, or one with an unsupported feature
│   ├── WeightsError    a checkpoint that does not fit the model
│   ├── ImageError      an image, a folder or a CSV of images that cannot be read
│   └── RecordError     a JSON or TOML file that does not fit its schema
├── OutputError         a file or folder that cannot be written: no permission, disk full
├── MissingError        a package or program that this command needs is not installed
├── DeviceError         an unknown device, or one that is not this machine
├── HostError           a machine that cannot be reached over ssh, or that gives an invalid answer
├── ExportError         an ONNX file that fails a check (static shapes, logits equal to PyTorch's)
├── EngineError         a runtime that cannot compile, load or run a model
├── PrecisionError      a lower precision that is slower than a wider one or loses more than allowed
├── VerifyError         a bundle that is damaged, is for another machine, or computes something else
├── SweepError          builds of a sweep that failed; the others have their results
└── ScheduleError       no schedule meets the goal
"""

from __future__ import annotations

REPORT = "please report it at https://github.com/edgeprune/edgeprune/issues with the command and its output"


def install(extra: str) -> str:
    """How to add optional packages: edgeprune is on no index, so that pip needs the checkout or the wheel."""
    return f'pip install ".[{extra}]" in the checkout, or "WHEEL[{extra}]" with the wheel of the release'


class EdgepruneError(Exception):
    """Base of all errors; the command line prints the message as one line and exits with 1."""


class InputError(EdgepruneError):
    """A file or an option that cannot be used."""


class ModelError(InputError):
    """An unknown model, not a Vision Transformer, or one with an unsupported feature."""


class WeightsError(InputError):
    """A checkpoint that does not fit the model."""


class ImageError(InputError):
    """An image, a folder or a CSV of images that cannot be read."""


class RecordError(InputError):
    """A JSON or TOML file that does not fit its schema."""


class OutputError(EdgepruneError):
    """A file or folder that cannot be written."""


class MissingError(EdgepruneError):
    """A package or program that this command needs is not installed."""


class DeviceError(EdgepruneError):
    """An unknown device, or one that is not this machine."""


class HostError(EdgepruneError):
    """A machine that cannot be reached over ssh, or that gives an invalid answer."""


class ExportError(EdgepruneError):
    """An ONNX file that fails a check."""


class PrecisionError(EdgepruneError):
    """A lower precision that is slower than a wider one or loses more than allowed."""


class EngineError(EdgepruneError):
    """A runtime that cannot compile, load or run a model."""


class VerifyError(EdgepruneError):
    """A bundle that is damaged, is for another machine, or computes something else."""


class SweepError(EdgepruneError):
    """Builds of a sweep that failed; the others have their results."""


class ScheduleError(EdgepruneError):
    """No schedule meets the goal."""
