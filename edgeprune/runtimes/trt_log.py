"""What TensorRT logs: one logger per process, and the reasons in its lines."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

MIB = 1 << 20
# Phrases in TensorRT's log, and what they mean to a user; the first match is shown.
BUILD_FAILURES = (
    (("out of memory", "outofmemory", "cuda failure: 2", "insufficient memory"), "memory ran out"),
    (("insufficient workspace",), "the workspace is too small"),
    (("could not find any implementation", "no implementation"), "there is no kernel for a layer"),
)
# Their words as in NVIDIA/TensorRT#564 and #2176 (another GPU), #2983 and #2041 (another version).
PLAN_REFUSALS = (
    (("generated on an incompatible device",), "another GPU"),
    (
        ("version tag does not match", "not compatible with this version", "expecting library version"),
        "another TensorRT version",
    ),
)
MHA_BUG = "mha_fusion.cpp"  # an assertion of 8.6 in fusing attention: NVIDIA/TensorRT#3930


@lru_cache(maxsize=1)
def logger_of(trt: Any) -> Any:
    """The TensorRT logger of this process, which keeps its lines as `lines` (severity name, text).

    TensorRT keeps the first logger that it is given and ignores others, so that their lines would stay empty.
    Whoever starts a build or loads a plan clears `lines` first. VERBOSE ones are dropped: a build writes thousands,
    and those on tactics skipped for lack of memory would look like the reason of a failure.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name != "VERBOSE":
                self.lines.append((severity.name, message))

    return Logger()


def errors_in(logger: Any) -> list[str]:
    """The lines of severity ERROR and INTERNAL_ERROR, each at most 300 characters."""
    return [text[:300] for severity, text in logger.lines if severity in ("ERROR", "INTERNAL_ERROR")]


def last_error(logger: Any) -> str:
    """The last error."""
    return (errors_in(logger) or ["no reason given"])[-1]


def is_mha_bug(logger: Any) -> bool:
    """Did the build fail in TensorRT's own fusion of attention?"""
    return any(MHA_BUG in text for _, text in logger.lines)


def build_failure(logger: Any, workspace: int, free_bytes: int) -> str:
    """Why a build failed, from its log, and what to do."""
    what, last = _cause(logger, BUILD_FAILURES), last_error(logger)
    advice = (
        f"workspace {workspace // MIB} MiB, {free_bytes // MIB} MiB of GPU memory free: close other programs or "
        "lower workspace_mib under [trt] of the device file"
    )
    return f"{what or last}: {advice}" + (f" ({last})" if what else "")


def plan_refusal(logger: Any) -> str:
    """Why a plan was refused, from the log, and what to do."""
    foreign = _cause(logger, PLAN_REFUSALS)
    if foreign:
        return f"it was built for {foreign}: compile the ONNX here"
    return "it is truncated or not a plan: compile the ONNX again"


def _cause(logger: Any, table: tuple[tuple[tuple[str, ...], str], ...]) -> str | None:
    text = "\n".join(text for _, text in logger.lines).lower()
    return next((meaning for signs, meaning in table if any(sign in text for sign in signs)), None)
