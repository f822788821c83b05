"""Pictures with the tokens kept after every cut, as HTML: patches that share a token share a colour."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from math import isqrt

from edgeprune.records import Sample, Schedule

COLOURS = 7  # of groups of patches
PNG = b"\x89PNG"


def pictures(schedule: Schedule, samples: Sequence[Sample]) -> str:
    """A section with a row a picture: as the network sees it, then after each cut; empty where nothing is cut."""
    if not any(sample.groups for sample in samples):
        return ""
    patches = [group for sample in samples for cut in sample.groups for group in cut]
    text = "After each cut, patches of one colour share one token; patches left plain still have their own"
    text += "; dark patches have none." if min(patches) < 0 else "."
    parts = [
        f'<section class="long"><h2>Tokens kept</h2><p class="note">{text} The pictures are from the evaluation set, '
        'and go wherever this bundle goes.</p><div class="samples">'
    ]
    for index, sample in enumerate(samples):
        kind = "png" if sample.picture.startswith(PNG) else "jpeg"
        side = isqrt(len(sample.groups[0]))
        data = f"data:image/{kind};base64,{b64encode(sample.picture).decode()}"
        image = f'<image id="picture{index}" href="{data}" width="{side}" height="{side}"/>'
        name, again = f"picture {index + 1}", f'<use href="#picture{index}"/>'
        cells = [f"{_svg(side, name, image)}<figcaption>{schedule.vit.tokens} tokens</figcaption>"]
        for block, cut in zip(schedule.cuts, sample.groups, strict=False):
            drawn = _svg(side, f"{name} after block {block}", again + colours(cut))
            cells.append(f"{drawn}<figcaption>block {block}: {schedule.tokens[block]}</figcaption>")
        grid = "".join(f"<figure>{cell}</figure>" for cell in cells)
        columns = f"--columns: {min(len(cells), 8)}; --narrow: {min(len(cells), 3)}"
        title = f'<p class="note">{_seen(sample)}</p>'
        kind = "sample few" if len(cells) < 4 else "sample"
        parts.append(f'<div class="{kind}" style="{columns}">{title}<div class="cuts">{grid}</div></div>')
    return "".join(parts) + "</div></section>"


def _seen(sample: Sample) -> str:
    """What a picture shows and what the models see; of a class's synonyms the first."""
    label, unpruned, pruned = (
        escape(name.partition(",")[0]) for name in (sample.label or "", sample.unpruned, sample.pruned)
    )
    seen = f"the unpruned model sees {unpruned}, the pruned one {pruned}"
    if sample.unpruned == sample.pruned:
        seen = f"both models see {pruned}"
    return f"<strong>{label}</strong>: {seen}" if sample.label is not None else seen


def _svg(side: int, name: str, content: str) -> str:
    return f'<svg class="picture" viewBox="0 0 {side} {side}" role="img" aria-label="{name}">{content}</svg>'


def colours(groups: Sequence[int]) -> str:
    """SVG over a picture, one unit a patch, row by row: its patches coloured by group, borders around the groups.

    A patch that is alone in its group stays as it is, one in no group (-1) is dimmed.
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
    return f'{paths}<path class="border" d="{"".join(borders)}"/>'
