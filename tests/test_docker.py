"""The Dockerfiles name sources, extras and commands that exist; they are linted here, not built."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from edgeprune.devices import load_device

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_both_are_there() -> None:
    assert [path.name for path in FILES] == ["Dockerfile.jetson", "Dockerfile.x86"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_sources_extras_and_entry_point_exist(path: Path) -> None:
    found = instructions(path)
    assert {keyword for keyword, _ in found} <= {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "ENTRYPOINT"}
    for keyword, rest in found:
        if keyword == "COPY":
            *sources, _ = shlex.split(rest)
            assert sources and all((ROOT / source).exists() for source in sources), rest
        if keyword == "ENTRYPOINT":
            assert json.loads(rest) == [next(iter(PROJECT["scripts"]))]
        for extras in re.findall(r"/src\[([\w,-]+)\]", rest):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    copied = {source for keyword, rest in found if keyword == "COPY" for source in shlex.split(rest)[:-1]}
    assert {"pyproject.toml", PROJECT["readme"], "edgeprune"} <= copied, "pip needs these to build the package"


def test_the_jetson_image_is_the_device_files() -> None:
    base = dict(instructions(ROOT / "docker" / "Dockerfile.jetson"))["FROM"]
    assert base == load_device("orin-nano").image
    assert "torch" not in (ROOT / "docker" / "Dockerfile.jetson").read_text(), "the device half needs no torch"
