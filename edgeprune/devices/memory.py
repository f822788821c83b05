"""Memory of this machine, or of the container that this process is in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# Limit, usage, and what of it is cached files in memory.stat: cgroup v2, and the memory controller of v1.
VERSIONS = (
    ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def available_bytes() -> int | None:
    """Memory that a new process could use, bytes; None where it cannot be read.

    MemAvailable of proc_meminfo(5), or what the limit of a control group (cgroups(7)) leaves, if that is less.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return min([int(found[1]) * 1024, *_left_in_groups()]) if found else None


def _left_in_groups() -> Iterator[int]:
    """What each limit on this process leaves, bytes; cached files count as free, as they do in MemAvailable."""
    for controller, limit, usage, cached in VERSIONS:
        for group in _groups(controller):
            try:
                most, used = int((group / limit).read_text()), int((group / usage).read_text())
                lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
                files = sum(int(value) for name, value in lines if name in cached)
            except (OSError, ValueError):  # not this version, or no limit ("max")
                continue
            yield max(most - used + files, 0)


def _groups(controller: str) -> Iterator[Path]:
    """The folder of this process's group and of those around it; in a container the outermost is its own."""
    top = GROUPS / controller
    try:
        lines = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:
        lines = []
    own = next((path for _, names, path in lines if controller in names.split(",")), "/")
    group = top / own.lstrip("/")
    yield from (each for each in (group, *group.parents) if each.is_relative_to(top))
