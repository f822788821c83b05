"""How figures are written, in tables and on the page."""

from __future__ import annotations

from edgeprune.records import DenseFidelity, EmbedFidelity, Latency, Recovery, Report, Unrecovered
from edgeprune.tasks import BY_NAME

UNKNOWN = "–"
ERROR = "relative error"  # of dense features: of the head's output, without a head of all layers


def number(value: float | None, digits: int = 2) -> str:
    """A figure; a dash where it is unknown."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int = 2) -> str:
    """A figure without recovery, with the standard error of what recovery changed."""
    return UNKNOWN if value is None or error is None else f"{value:.{digits}f} (±{error:.{digits}f})"


def fidelity_rows(report: Report) -> list[tuple[str, str, str]]:
    """The figures of fidelity: name, of the unpruned and of the pruned model."""
    found, compared = report.fidelity, report.agreement is not None
    if isinstance(found, DenseFidelity):
        return dense_rows(found)
    best = "100" if compared else UNKNOWN
    if isinstance(found, EmbedFidelity):
        shot = found.zero_shot_agreement is not None
        return [
            ("cosine, mean", "1" if compared else UNKNOWN, number(found.cosine, 4)),
            ("cosine, 1st percentile", "1" if compared else UNKNOWN, number(found.cosine_p1, 4)),
            ("same nearest neighbour, %", best, number(found.neighbour_agreement)),
            ("recall@5 of neighbours, %", best, number(found.recall5)),
            ("k-NN top-1, %", number(report.dense_top1), number(found.knn_top1)),
            *([("zero-shot agreement, %", "100", number(found.zero_shot_agreement))] if shot else []),
            *(
                [("zero-shot top-1, %", number(found.dense_zero_shot_top1), number(found.zero_shot_top1))]
                if shot
                else []
            ),
        ]
    return [
        ("top-1, %", number(report.dense_top1), number(report.top1)),
        ("agreement, %", best, number(report.agreement)),
        ("KL, nats", "0" if compared else UNKNOWN, number(report.kl, 4)),
    ]


def dense_rows(found: DenseFidelity) -> list[tuple[str, str, str]]:
    """The figures of dense features: of the head, of every layer, of the embedding."""
    rows = [(ERROR, "0", number(found.error, 4))]
    if found.head_error is not None:
        rows.append(("mean absolute difference of the head's output", "0", number(found.head_difference, 5)))
    for each in found.layers:
        rows.append((f"features of layer {each.layer}, relative error", "0", number(each.error, 4)))
        rows.append((f"features of layer {each.layer}, mean cosine", "1", number(each.cosine, 4)))
    return [*rows, ("cosine of the embedding, mean", "1", number(found.embedding_cosine, 4))]


def unrecovered_figures(before: Unrecovered) -> dict[str, str]:
    """The figures without recovery by the name of their row in a table."""
    if before.features is not None:
        rows = {name: value for name, _, value in dense_rows(before.features)}
        return rows | {ERROR: with_error(before.error, before.error_error, 4)}
    if before.cosine is not None:
        return {
            "cosine, mean": with_error(before.cosine, before.cosine_error, 4),
            "same nearest neighbour, %": with_error(before.agreement, before.agreement_error),
            "k-NN top-1, %": with_error(before.top1, before.top1_error),
        }
    return {
        "top-1, %": with_error(before.top1, before.top1_error),
        "agreement, %": with_error(before.agreement, before.agreement_error),
        "KL, nats": with_error(before.kl, before.kl_error, 4),
    }


def recovered_how(recovery: Recovery) -> str:
    """What recovery did, in one line."""
    loss = BY_NAME[recovery.task].loss_name
    trained = recovery.images - recovery.validation_images
    on = f"{trained} unlabelled pictures, validated on {recovery.validation_images} others"
    if not recovery.epochs:
        return f"weights unchanged: no epoch of recovery lowered the {loss} ({on})"
    epochs = f"{recovery.epochs} epoch{'s' if recovery.epochs > 1 else ''}"
    before, after = recovery.curve[0], recovery.curve[recovery.epochs]
    return f"weights recovered in {epochs} on {on}: {loss} {before:.3g} → {after:.3g}"


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
    return f"{images} images, some also used to choose the schedule: pass more --images for unbiased figures"
