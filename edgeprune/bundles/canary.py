"""A bundle shipped to a few devices first, verified and timed there, and rolled back where that fails."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgeprune.bundles.format import load_bundle, version_name
from edgeprune.bundles.remote_folder import CURRENT, PREVIOUS, RemoteFolder
from edgeprune.bundles.ship import Destination, Shipped, each, remote_folder, roll_back, ship
from edgeprune.errors import EdgepruneError, HostError, InputError
from edgeprune.records import Progress, silent

ROUNDS = 20  # of the bench on a canary
PENDING = ".canary"  # in the folder of a canary until it is decided: the name of the version that is tried


class Canary(NamedTuple):
    """How a bundle is tried before all devices get it."""

    hosts: int = 1  # the first so many destinations
    wait_s: float = 60.0  # between the bench there and the second verify
    fail_slower: float | None = None  # percent: fails if slower than the previous version by more than that


class _Row(msgspec.Struct):
    """What is read of a row of `bench --json`."""

    latency_ms: dict[str, float]
    speedup_to_first: float
    speedup_interval: tuple[float, float]


class _Bench(msgspec.Struct):
    """What is read of `bench --json`."""

    rows: tuple[_Row, ...]


def ship_with_canary(
    bundle: Path, to: Sequence[Destination], canary: Canary, progress: Progress = silent
) -> list[Shipped]:
    """Ship to the first destinations, which verifies there, bench there, wait, verify again, then ship to the rest.

    Where one of the first fails, all of them that were switched are rolled back and the rest is untouched. After an
    interruption the same call goes on: what it had switched counts as switched by this one. Raises InputError.
    """
    name = version_name(bundle, load_bundle(bundle))
    if not 0 < canary.hosts < len(to):
        raise InputError(
            f"--canary {canary.hosts} leaves none of the {len(to)} hosts for the second stage: pass a smaller number"
        )
    first, rest = to[: canary.hosts], to[canary.hosts :]
    shipped = [r._replace(canary=True) for r in each(lambda where: _shipped(bundle, name, where), first, progress)]
    before = dict(zip(first, shipped, strict=True))
    now = shipped
    if not _failed(now):
        now = each(lambda where: _benched(where, before[where], canary.fail_slower), first, progress)
    if not _failed(now):
        benched = dict(zip(first, now, strict=True))
        _wait(canary.wait_s, progress)
        now = each(lambda where: _verified(where, benched[where]), first, progress)
    if _failed(now):
        after = dict(zip(first, now, strict=True))
        undone = each(lambda where: _undone(where, before[where], after[where]), first, progress)
        each(_decided, first)
        untouched = [Shipped(where.text, "untouched", "the canary failed") for where in rest]
        return [result._replace(canary=True) for result in undone] + untouched
    each(_decided, first)
    return now + each(lambda where: ship(bundle, where), rest, progress)


def _shipped(bundle: Path, name: str, where: Destination) -> Shipped:
    """Ship to a canary; `name` is that of the version. Raises HostError."""
    quoted = shlex.quote(name)
    mark = f'[ "$(readlink {CURRENT})" = {quoted} ] || echo {quoted} > {PENDING}; cat {PENDING} 2>/dev/null || true'
    undecided = remote_folder(where).run(mark).strip() == name
    result = ship(bundle, where)
    return result._replace(state="switched") if undecided else result


def _decided(where: Destination) -> Shipped:
    """Nothing is pending any more. Raises HostError."""
    remote_folder(where).run(f"rm -f {PENDING}")
    return Shipped(where.text, "decided", "")


def _failed(results: Sequence[Shipped]) -> bool:
    return any(result.state == "failed" for result in results)


def _wait(seconds: float, progress: Progress) -> None:
    end, whole = time.monotonic() + seconds, max(1, round(seconds))
    while (left := end - time.monotonic()) > 0:
        progress("waiting before the canary is verified again, second", whole - min(whole, round(left)), whole)
        time.sleep(min(1.0, left))


def _benched(where: Destination, result: Shipped, fail_slower: float | None) -> Shipped:
    """The result with the latency measured there. Raises HostError, also where it is slower than allowed."""
    remote = remote_folder(where)
    compare = fail_slower is not None and result.state == "switched" and bool(remote.link(PREVIOUS))
    rows = _bench(remote, (PREVIOUS, CURRENT) if compare else (CURRENT,))
    result = result._replace(latency_ms=rows[-1].latency_ms)
    if not compare:
        return result
    assert fail_slower is not None
    speedup, (_, high) = rows[-1].speedup_to_first, rows[-1].speedup_interval
    if high * (1 + fail_slower / 100) < 1:
        raise HostError(
            f"{where.text}: at most {high:.3f}x as fast as the previous version (95 %), "
            f"more than {fail_slower:g} % slower: see edgeprune doctor there"
        )
    return result._replace(speedup_to_previous=speedup)


def _bench(remote: RemoteFolder, names: Sequence[str]) -> tuple[_Row, ...]:
    """The rows of `edgeprune bench` of versions there, in this order. Raises HostError."""
    bundles = " ".join(shlex.quote(f"./{name}") for name in names)
    said = remote.run(f"{remote.host.program} bench {bundles} --rounds {ROUNDS} --json").splitlines()
    try:
        rows = msgspec.json.decode(said[-1] if said else "", type=_Bench).rows
    except (msgspec.DecodeError, UnicodeError):
        rows = ()
    if len(rows) != len(names):
        raise HostError(
            f"{remote.host.address}: bench there returned no figures: install the same version of edgeprune there"
        )
    return rows


def _verified(where: Destination, result: Shipped) -> Shipped:
    """The result, if the bundle still verifies there. Raises HostError."""
    remote_folder(where).verify(CURRENT, " after the wait")
    return result


def _undone(where: Destination, before: Shipped, after: Shipped) -> Shipped:
    """What has become of a canary: `before` is what ship did, `after` what was found then; a switch is undone."""
    failed, why = after.state == "failed", after.detail
    if before.state in ("current", "mended"):
        return after._replace(detail=f"{why}; not rolled back, it was current before") if failed else after
    if before.state == "failed":
        return after
    try:
        name = _roll_back(where, before.detail)
    except EdgepruneError as error:
        cause = " ".join(str(error).split())
        return after._replace(state="failed", detail=f"{why}; not rolled back: {cause}" if failed else cause)
    back = f"rolled back to {name}" if name else f"{CURRENT} removed, there is no previous version"
    return after._replace(detail=f"{why}; {back}") if failed else after._replace(state="rolled back", detail=back)


def _roll_back(where: Destination, name: str) -> str | None:
    """Switch back from the version `name`; the version that is current then, None where there was none before."""
    remote = remote_folder(where)
    if remote.link(PREVIOUS):
        return roll_back(where).detail
    with remote.locked():
        if remote.link(CURRENT) == name:
            remote.run(f"rm -f {CURRENT}")
    return None
