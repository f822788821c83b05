"""The pages of the documentation as tests read them: fenced blocks, command lines, and code in the text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

PAGES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "calib" / "README.md",
        ROOT / "engines" / "README.md",
        ROOT / "docker" / "runner" / "README.md",
    )
)
FENCE = re.compile(r"^ *```(.*)$")
PROMPT = re.compile(r"^ *\w+\$ ")
INLINE = re.compile(r"`([^`\n]+)`")


class Block(NamedTuple):
    """A fenced block: its language, the line it begins on, and what is in it."""

    language: str
    line: int
    text: str


class Command(NamedTuple):
    """A command line of a page, split into words; comments and prompts removed."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    opened: tuple[str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if fence is None:
            inside.append(line)
        elif opened is None:
            opened, inside = (fence[1].partition(" ")[0].lstrip("{."), number), []
        else:
            yield Block(*opened, "\n".join(inside))
            opened = None
    assert opened is None, f"{page}: a fenced block is not closed"


def commands(page: str) -> Iterator[Command]:
    """The command lines in the `sh` blocks of a page, in order; parts joined by && are commands of their own."""
    for block in blocks(page):
        if block.language != "sh":
            continue
        number, pending = block.line, ""
        for line in block.text.splitlines():
            number += 1
            pending += line.removesuffix("\\") + " "
            if line.endswith("\\"):
                continue
            for part in PROMPT.sub("", pending).split("&&"):
                words = tuple(shlex.split(part, comments=True))
                if words:
                    yield Command(page, number, words)
            pending = ""


def inline(page: str) -> Iterator[str]:
    """The code in the running text and the tables of a page."""
    text = (ROOT / page).read_text()
    for block in blocks(page):
        text = text.replace(block.text, "")
    return (found[1] for found in INLINE.finditer(text))


def script_of(command: Command) -> Path | None:
    """The Python script that a command runs; None where it runs something else."""
    words = command.words
    if Path(words[0]).name == "python" and len(words) > 1 and words[1].endswith(".py"):
        return ROOT / words[1]
    return None
