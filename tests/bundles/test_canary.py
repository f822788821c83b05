"""`ship --canary`: the first hosts are verified and timed before the rest, and go back if that fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.builds import Shared, call, row_of
from support.loopback import Server

from edgeprune.bundles.format import load_bundle, version_name

pytestmark = pytest.mark.usefixtures("ssh")
LATENCY = {"median": 1.0, "p99": 1.2, "low": 0.9, "high": 1.1, "p90": 1.1}
# In the place of edgeprune: notes its commands; with `breaks`, what is current no longer verifies.
PROGRAM = """#!/bin/sh
echo "$*" >>{log}
case $1 in
verify) if [ "$2" = ./current ] && {breaks}; then echo "error: output: expected 1, found 2" >&2; exit 1; fi ;;
bench) [ -z '{said}' ] && {{ echo "error: the engine does not load" >&2; exit 1; }}; echo '{said}' ;;
esac
"""


def rows(*speedups: tuple[float, float, float]) -> str:
    """What bench says: the speed-up to the first with its interval, for each bundle."""
    found = [{"latency_ms": LATENCY, "speedup_to_first": s, "speedup_interval": [a, b]} for s, a, b in speedups]
    return json.dumps({"rows": found, "more": 1})


class Fleet:
    """Three folders of one machine, of which the first has a program of its own."""

    def __init__(self, there: Server, shared: Shared, folder: Path) -> None:
        self.there, self.shared, self.folder = there, shared, folder
        self.log, self.hosts = folder / "log", folder / "hosts.toml"

    def places(self) -> list[Path]:
        return [self.folder / name for name in ("first", "second", "third")]

    def write(self, said: str = "", breaks: bool = False, real: bool = False, count: int = 3) -> Path:
        """The list of hosts; `real` ones have edgeprune itself."""
        program = self.folder / "program"
        program.write_text(PROGRAM.format(log=self.log, breaks="true" if breaks else "false", said=said))
        program.chmod(0o755)
        which = self.there.program if real else program
        self.hosts.write_text(
            "".join(
                f'[[to]]\nhost = "{self.there.address}"\ndir = "{place}"\nprogram = "{which}"\n'
                for place in self.places()[:count]
            )
        )
        self.log.write_text("")
        return self.hosts

    def bundle(self, text: str, current: bool = False) -> Path:
        """The shared bundle with another label. It lies at each device, so that nothing has to be sent."""
        copy = self.folder / f"bundle-{text}"
        shutil.copytree(self.shared.bundle, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["labels"][0] = text
        (copy / "manifest.json").write_text(json.dumps(manifest))
        name = version_name(copy, load_bundle(copy))
        for place in self.places():
            shutil.copytree(copy, place / name)
            if current:
                (place / "current").symlink_to(name)
        return copy

    def labels(self) -> list[str | None]:
        """Which bundle is current at each."""
        files = [place / "current" / "manifest.json" for place in self.places()]
        return [json.loads(file.read_text())["labels"][0] if file.exists() else None for file in files]


@pytest.fixture
def devices(there: Server, shared: Shared, tmp_path: Path) -> Fleet:
    return Fleet(there, shared, tmp_path)


Refused = Callable[..., tuple[list[dict[str, Any]], str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(*argv) is the rows and the one line of a ship that fails."""

    def run(*argv: object) -> tuple[list[dict[str, Any]], str]:
        code, out, err = call(capsys, "ship", *argv, "--json")
        assert code == 1, err
        return json.loads(out.splitlines()[-1])["rows"], err.splitlines()[-1]

    return run


def test_canary_then_the_rest(devices: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """With edgeprune itself at the far end, which times the bundle."""
    hosts = devices.write(real=True, count=2)
    command = ("ship", devices.bundle("one"), "--all", hosts, "--canary", 1, "--wait", 0.1)
    first, second = row_of(capsys, *command)["rows"]
    assert (first["state"], first["canary"]) == ("switched", True) and first["speedup_to_previous"] is None
    assert 0 < first["latency_ms"]["low"] <= first["latency_ms"]["median"] <= first["latency_ms"]["high"]
    assert (second["state"], second["canary"], second["latency_ms"]) == ("switched", False, None)
    assert devices.labels() == ["one", "one", None]


def test_the_order_of_things(devices: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = devices.write(rows((1, 1, 1)))
    row_of(capsys, "ship", devices.bundle("one"), "--all", hosts, "--canary", 2, "--wait", 0)
    said = devices.log.read_text().splitlines()
    assert sorted(line.split()[0] for line in said[:2]) == ["verify", "verify"], "before the switch, on two"
    assert [line.split()[:2] for line in said[2:4]] == [["bench", "./current"]] * 2
    assert said[4:6] == ["verify ./current"] * 2 and said[6].startswith("verify ./vit_digits"), "again; then the rest"
    assert len(said) == 7 and devices.labels() == ["one"] * 3
    devices.write(rows((1, 1, 1), (0.97, 0.93, 0.99)), count=2)
    done = row_of(
        capsys, "ship", devices.bundle("two"), "--all", hosts, "--canary", 1, "--wait", 0, "--fail-slower", 5
    )
    assert [row["speedup_to_previous"] for row in done["rows"]] == [0.97, None], "5 % is within the interval"
    assert any(line.startswith("bench ./previous ./current ") for line in devices.log.read_text().splitlines())
    assert devices.labels() == ["two", "two", "one"]


@pytest.mark.parametrize(
    ("said", "breaks", "why"),
    [
        (rows((1, 1, 1), (1, 1, 1)), True, "after the wait: error: output: expected 1, found 2"),
        ("no figures", False, "returned no figures"),
        (rows((1, 1, 1), (0.8, 0.75, 0.9)), False, "at most 0.900x as fast as the previous version"),
    ],
)
def test_a_canary_that_fails_goes_back(said: str, breaks: bool, why: str, devices: Fleet, refused: Refused) -> None:
    hosts = devices.write(said, breaks)
    devices.bundle("one", current=True)
    options = ("--canary", 1, "--wait", 0, "--fail-slower", 5)
    found, line = refused(devices.bundle("two"), "--all", hosts, *options)
    assert [row["state"] for row in found] == ["failed", "untouched", "untouched"]
    assert why in line and "rolled back to vit_digits" in line and "1 of 3 failed, 2 untouched: " in line
    assert devices.labels() == ["one"] * 3 and not (devices.folder / "second" / "previous").exists()


def test_one_of_two_fails_and_both_go_back(devices: Fleet, refused: Refused) -> None:
    """The second canary has no host; on the first nothing was there before."""
    hosts = devices.write()
    text = hosts.read_text().split("[[to]]")
    text[2] = text[2].replace(devices.there.address, "nobody@host.invalid")
    hosts.write_text("[[to]]".join(text))
    found, line = refused(devices.bundle("one"), "--all", hosts, "--canary", 2, "--wait", 0)
    assert [row["state"] for row in found] == ["rolled back", "failed", "untouched"]
    assert "there is no previous version" in found[0]["detail"] and "host.invalid" in line
    assert devices.labels() == [None] * 3 and not (devices.folder / "first" / "current").is_symlink()


def test_what_was_current_before_stays(devices: Fleet, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = devices.write(rows((1, 1, 1)), breaks=True)
    bundle = devices.bundle("one", current=True)
    found, line = refused(bundle, "--all", hosts, "--canary", 1, "--wait", 0)
    assert [row["state"] for row in found] == ["failed", "untouched", "untouched"] and "was current before" in line
    assert devices.labels() == ["one"] * 3


def test_a_canary_that_was_interrupted_is_still_one(
    devices: Fleet, refused: Refused, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first run had switched is compared with the version before and goes back, as if it were one run."""
    options = ("--canary", 1, "--wait", 0, "--fail-slower", 5)
    hosts, said = devices.write(rows((1, 1, 1), (1, 1, 1))), (1, 1, 1)
    devices.bundle("one", current=True)
    bundle = devices.bundle("two")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeprune.bundles.canary._wait", interrupted)
        assert call(capsys, "ship", bundle, "--all", hosts, *options)[0] == 130
    assert devices.labels() == ["two", "one", "one"]
    devices.write(rows(said, (0.8, 0.75, 0.9)))
    _, line = refused(bundle, "--all", hosts, *options)
    assert "at most 0.900x as fast as the previous version" in line and "rolled back to vit_digits" in line
    assert devices.labels() == ["one"] * 3 and not list(devices.folder.glob("*/.canary"))
    devices.write(rows(said, said))
    done = row_of(capsys, "ship", bundle, "--all", hosts, *options)["rows"]
    assert [row["speedup_to_previous"] for row in done] == [1, None, None] and devices.labels() == ["two"] * 3
    assert not list(devices.folder.glob("*/.canary"))


def test_wrong_use(devices: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    hosts, bundle = devices.write(), devices.bundle("one")
    for argv in (
        (bundle, "me@host:dir", "--canary", 1),
        (bundle, "--all", hosts, "--wait", 5),
        (bundle, "--all", hosts, "--fail-slower", 5),
        ("--roll-back", "--all", hosts, "--canary", 1),
        (bundle, "--all", hosts, "--canary", 0),
    ):
        assert call(capsys, "ship", *argv)[0] == 2
    code, _, err = call(capsys, "ship", bundle, "--all", hosts, "--canary", 3)
    assert code == 1 and "leaves none of the 3 hosts" in err and devices.labels() == [None] * 3
