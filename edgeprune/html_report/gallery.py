"""The pictures of the report page, with the tokens after every cut: patches that share a token share a colour."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from edgeprune.errors import RecordError
from edgeprune.records import Sample, Schedule

COLOURS = 7  # for groups of patches
PNG = b"\x89PNG"


class Cut(NamedTuple):
    """The patches of a picture after one cut."""

    block: int
    tokens: int
    patches: Markup  # SVG to draw over the picture


class Picture(NamedTuple):
    """A picture with its label and the predicted classes, or how far its outputs are off, and its cuts."""

    data: str  # as a data: URI
    rows: int  # of patches
    columns: int
    label: str | None
    unpruned: str | None
    pruned: str | None
    cosine: float | None
    error: float | None
    cuts: list[Cut]
    dropped: bool  # some patches are in none of the tokens


def pictures(schedule: Schedule, samples: Sequence[Sample]) -> list[Picture]:
    """The samples as the page draws them; only those with cuts. Raises RecordError where they are of another grid."""
    return [_picture(schedule, sample) for sample in samples if sample.groups]


def _picture(schedule: Schedule, sample: Sample) -> Picture:
    rows, columns = schedule.vit.grid
    if len(sample.groups[0]) != rows * columns:
        raise RecordError(
            f"a picture is divided into {len(sample.groups[0])} patches, not the {rows}x{columns} of the model: "
            "build the bundle again"
        )
    kind = "png" if sample.picture.startswith(PNG) else "jpeg"
    cuts = zip(schedule.cuts, sample.groups, strict=False)
    return Picture(
        data=f"data:image/{kind};base64,{b64encode(sample.picture).decode()}",
        rows=rows,
        columns=columns,
        label=_first(sample.label),
        unpruned=_first(sample.unpruned),
        pruned=_first(sample.pruned),
        cosine=sample.cosine,
        error=sample.error,
        cuts=[Cut(block, schedule.tokens[block], colours(groups, columns)) for block, groups in cuts],
        dropped=any(group < 0 for cut in sample.groups for group in cut),
    )


def _first(name: str | None) -> str | None:
    """The first of the synonyms in a class name."""
    return None if name is None else name.partition(",")[0]


def colours(groups: Sequence[int], columns: int) -> Markup:
    """SVG to draw over a picture, one unit per patch, row by row: patches coloured by group, with borders of groups.

    A patch that is alone in its group is not coloured; one without a group (-1) is dimmed.
    """
    first, count = dict[int, int](), dict[int, int]()
    for patch, group in enumerate(groups):
        first.setdefault(group, patch)
        count[group] = count.get(group, 0) + 1
    fills: dict[str, list[str]] = {}
    borders = []
    for patch, group in enumerate(groups):
        row, column = divmod(patch, columns)
        if group < 0 or count[group] > 1:
            top, left = divmod(first[group], columns)
            kind = "gone" if group < 0 else f"g{(3 * top + left) % COLOURS}"  # neighbours differ
            fills.setdefault(kind, []).append(f"M{column} {row}h1v1h-1z")
        for other, inside, border in (
            (patch + 1, column + 1 < columns, f"M{column + 1} {row}v1"),
            (patch + columns, patch + columns < len(groups), f"M{column} {row + 1}h1"),
        ):
            if inside and groups[other] != group and max(count[group], count[groups[other]]) > 1:
                borders.append(border)
    paths = "".join(f'<path class="{kind}" d="{"".join(d)}"/>' for kind, d in sorted(fills.items()))
    return Markup(f'{paths}<path class="border" d="{"".join(borders)}"/>')
