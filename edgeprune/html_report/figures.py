"""How figures are written, in tables and on the page."""

from __future__ import annotations

from edgeprune.records import Latency, Recovery, Unrecovered

UNKNOWN = "–"


def number(value: float | None, digits: int = 2) -> str:
    """A figure; a dash where it is unknown."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int = 2) -> str:
    """A figure without recovery, with the standard error of what recovery changed."""
    return UNKNOWN if value is None or error is None else f"{value:.{digits}f} (±{error:.{digits}f})"


def unrecovered_figures(before: Unrecovered) -> dict[str, str]:
    """The figures without recovery by the name of their row in a table."""
    return {
        "top-1, %": with_error(before.top1, before.top1_error),
        "agreement, %": with_error(before.agreement, before.agreement_error),
        "KL, nats": with_error(before.kl, before.kl_error, 4),
    }


def recovered_how(recovery: Recovery) -> str:
    """What recovery did, in one line."""
    trained = recovery.images - recovery.validation_images
    on = f"{trained} pictures without labels, judged on {recovery.validation_images} others"
    if not recovery.epochs:
        return f"weights unchanged: no epoch of recovery lowered the KL ({on})"
    epochs = f"{recovery.epochs} epoch{'s' if recovery.epochs > 1 else ''}"
    return f"weights recovered in {epochs} on {on}: KL {recovery.kl_before:.3g} → {recovery.kl_after:.3g}"


def interval(latency: Latency | None) -> str:
    """The 95 % interval of a median latency, ms."""
    if latency is None:
        return UNKNOWN
    low, high = latency.interval_ms
    return f"{low:.3f} to {high:.3f}"


def evaluated_on(images: int, held_out: bool | None) -> str:
    """Which images the figures of accuracy were measured on."""
    if held_out is None:
        return f"{images} images"
    if held_out:
        return f"{images} images not used to choose the schedule"
    return f"all {images} images, some also used to choose the schedule: pass more --images for unbiased figures"
