"""Memory that is left: of the machine, and below the limits of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.devices import memory

V2 = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 700\nactive_file 50\ninactive_file 100\n"}
V1 = {
    "memory.limit_in_bytes": "1000",
    "memory.usage_in_bytes": "900",
    "memory.stat": "active_file 1\ntotal_active_file 50\ntotal_inactive_file 100\n",
}


@pytest.mark.parametrize(
    ("groups", "folder", "files", "left"),
    [
        ("0::/\n", "", V2, 250),
        ("0::/pod/box\n", "pod/box", V2, 250),
        ("0::/pod/box\n", "pod", V2, 250),  # the limit of a group around it
        ("0::/pod/box\n", "", V2, 250),  # a container that sees its own group as the outermost
        ("0::/\n", "", V2 | {"memory.max": "max"}, 5 * 1024),
        ("0::/\n", "", V2 | {"memory.current": "5000"}, 0),
        ("0::/\n", "", V2 | {"memory.stat": "broken"}, 5 * 1024),
        ("4:memory:/docker/1\n0::/\n", "memory/docker/1", V1, 250),
        ("4:cpu,memory:/docker/1\n", "memory", V1, 250),
        ("", "elsewhere", V2, 5 * 1024),
    ],
)
def test_a_limit_of_a_container_counts(
    groups: str, folder: str, files: dict[str, str], left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in (("MEMINFO", "meminfo"), ("OWN_GROUPS", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / path)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    (tmp_path / "own").write_text(groups)
    (tmp_path / "groups" / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "groups" / folder / name).write_text(text)
    assert memory.available_bytes() == left
    (tmp_path / "meminfo").unlink()
    assert memory.available_bytes() is None
