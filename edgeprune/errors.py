"""The tree of errors a user can meet; each message is one line that ends with what to do.

EdgepruneError
├── InputError          a file or an option that cannot be used
│   ├── ModelError      unknown model, no Vision Transformer, or an unsupported feature of one
│   ├── WeightsError    a checkpoint that does not fit the model
│   ├── ImageError      an image, a folder or a CSV of images that cannot be read
│   └── RecordError     a JSON or TOML file whose content is not what its schema says
├── OutputError         a place that cannot be written: no permission, disk full
├── MissingError        a package this command needs is not installed
├── DeviceError         unknown device, or not this machine
├── HostError           a machine that cannot be reached over ssh, or answers wrongly
├── ExportError         an ONNX file that breaks a promise (static shapes, equal logits)
├── EngineError         a runtime that cannot compile, load or run a model
├── PrecisionError      fp16 or INT8 that is slower or loses more than allowed
├── VerifyError         a bundle that is damaged, does not belong here, or computes something else
└── ScheduleError       no schedule meets what was asked
"""

from __future__ import annotations

REPORT = "please report it at https://github.com/edgeprune/edgeprune/issues with the command and its output"


class EdgepruneError(Exception):
    """Base of all; the command line prints it as one line and exits with 1."""


class InputError(EdgepruneError):
    """A file or an option that cannot be used."""


class ModelError(InputError):
    """Unknown model, no Vision Transformer, or an unsupported feature of one."""


class WeightsError(InputError):
    """A checkpoint that does not fit the model."""


class ImageError(InputError):
    """An image, a folder or a CSV of images that cannot be read."""


class RecordError(InputError):
    """A JSON or TOML file whose content is not what its schema says."""


class OutputError(EdgepruneError):
    """A place that cannot be written."""


class MissingError(EdgepruneError):
    """A package this command needs is not installed."""


class DeviceError(EdgepruneError):
    """Unknown device, or not this machine."""


class HostError(EdgepruneError):
    """A machine that cannot be reached over ssh, or answers wrongly."""


class ExportError(EdgepruneError):
    """An ONNX file that breaks a promise."""


class PrecisionError(EdgepruneError):
    """fp16 or INT8 that is slower, or loses more, than allowed."""


class EngineError(EdgepruneError):
    """A runtime that cannot compile, load or run a model."""


class VerifyError(EdgepruneError):
    """A bundle that is damaged, does not belong here, or computes something else."""


class ScheduleError(EdgepruneError):
    """No schedule meets what was asked."""
