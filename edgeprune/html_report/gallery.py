"""Pictures with the tokens kept after every cut, for the page: patches that share a token share a colour."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

from markupsafe import Markup

from edgeprune.records import Sample, Schedule

COLOURS = 7  # of groups of patches
PNG = b"\x89PNG"


class Cut(NamedTuple):
    """What a cut leaves of a picture."""

    block: int
    tokens: int
    patches: Markup  # SVG to lay over the picture


class Picture(NamedTuple):
    """A picture, its class, the classes that the models predict, and its cuts."""

    data: str  # as a data: URI
    side: int  # patches
    label: str | None
    unpruned: str
    pruned: str
    cuts: list[Cut]
    dropped: bool  # some patches are in no token


def pictures(schedule: Schedule, samples: Sequence[Sample]) -> list[Picture]:
    """The samples as the page draws them; none where nothing is cut."""
    return [_picture(schedule, sample) for sample in samples if sample.groups]


def _picture(schedule: Schedule, sample: Sample) -> Picture:
    kind = "png" if sample.picture.startswith(PNG) else "jpeg"
    cuts = zip(schedule.cuts, sample.groups, strict=False)
    return Picture(
        data=f"data:image/{kind};base64,{b64encode(sample.picture).decode()}",
        side=isqrt(len(sample.groups[0])),
        label=None if sample.label is None else _first(sample.label),
        unpruned=_first(sample.unpruned),
        pruned=_first(sample.pruned),
        cuts=[Cut(block, schedule.tokens[block], colours(groups)) for block, groups in cuts],
        dropped=any(group < 0 for cut in sample.groups for group in cut),
    )


def _first(name: str) -> str:
    """Of a class's synonyms the first."""
    return name.partition(",")[0]


def colours(groups: Sequence[int]) -> Markup:
    """SVG over a picture, one unit a patch, row by row: its patches coloured by group, borders around the groups.

    A patch that has a group to itself stays as it is, one in no group (-1) is dimmed.
    """
    side = isqrt(len(groups))
    first, count = dict[int, int](), dict[int, int]()
    for patch, group in enumerate(groups):
        first.setdefault(group, patch)
        count[group] = count.get(group, 0) + 1
    fills: dict[str, list[str]] = {}
    borders = []
    for patch, group in enumerate(groups):
        row, column = divmod(patch, side)
        if group < 0 or count[group] > 1:
            top, left = divmod(first[group], side)
            kind = "gone" if group < 0 else f"g{(3 * top + left) % COLOURS}"  # neighbours differ
            fills.setdefault(kind, []).append(f"M{column} {row}h1v1h-1z")
        for other, inside, border in (
            (patch + 1, column + 1 < side, f"M{column + 1} {row}v1"),
            (patch + side, row + 1 < side, f"M{column} {row + 1}h1"),
        ):
            if inside and groups[other] != group and max(count[group], count[groups[other]]) > 1:
                borders.append(border)
    paths = "".join(f'<path class="{kind}" d="{"".join(d)}"/>' for kind, d in sorted(fills.items()))
    return Markup(f'{paths}<path class="border" d="{"".join(borders)}"/>')
