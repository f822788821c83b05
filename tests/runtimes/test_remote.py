"""`--host`: the device half behind a real OpenSSH server on loopback, in a process that cannot import torch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from support.builds import CONTRACT, QUICK, Shallow, Shared, call, few_digits, row_of
from support.loopback import Server
from support.processes import after_saves, die, fork

from edgeprune import __version__
from edgeprune.bundles.format import load_bundle
from edgeprune.devices import load_device
from edgeprune.errors import EngineError, HostError, OutputError
from edgeprune.io import sha256_bytes
from edgeprune.records import GpuState
from edgeprune.runtimes import TimedTogether
from edgeprune.runtimes.remote import busy, protocol
from edgeprune.runtimes.remote.runtime import RemoteSession
from edgeprune.runtimes.remote.ssh import Channel, Host
from edgeprune.runtimes.remote.worker import RAMP_MS, Worker, serve
from edgeprune.runtimes.target import target_for

pytestmark = pytest.mark.usefixtures("ssh")


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def build_on(there: Server, shallow: Shallow, folder: Path) -> tuple[object, ...]:
    """The arguments of a build on a host below `folder`; the profiling models are there already."""
    work, few = shallow.work(folder / "work"), few_digits(folder / "digits")
    out = ("--work", work, "--out", folder / "bundle", "--images", few)
    goal = ("--method", "topk", "--speedup", "1.2", *QUICK)
    return ("build", "--device", "cpu", "--model", shallow.model, *there.options, *goal, *out)


def test_build_on_a_host(there: Server, shallow: Shallow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported here, measured there; the bundle is here, for that machine; a second build measures nothing."""
    command = build_on(there, shallow, tmp_path)
    row = row_of(capsys, *command)
    assert set(CONTRACT) <= set(row) and row["runtime"] == "ort-cpu" and row["images"] == 21
    sent = {path.name for path in (there.home / ".cache/edgeprune/files").iterdir()}
    manifest = load_bundle(tmp_path / "bundle")
    assert manifest.engine.sha256 in sent, "the engine was not run on the host"
    assert manifest.files["golden_output.npy"]
    again = row_of(capsys, *command)
    assert again == row
    code, _, err = call(capsys, "bench", tmp_path / "bundle", "--rounds", "5")
    assert code == 0, err


def test_profile_on_a_host(
    there: Server, shallow: Shallow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = shallow.work(tmp_path / "work") / shallow.models.name / "trunk.onnx"
    out = ("--work", tmp_path / "work", "--out", tmp_path / "s.json")
    row = row_of(capsys, "profile", *there.options, "--trunk", trunk, *out)
    assert row["simulated"] is False and row["points"][-1]["tokens"] == 197


def test_logits_are_those_of_this_machine(
    there: Server, shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_THREADS", "1")  # as there
    here, far = target_for("cpu", work=tmp_path), target_for("cpu", work=tmp_path, host=_host(there))
    assert here.setup == far.setup, "loopback is this machine"
    images = np.load(shared.bundle / "golden_input.npy")
    with here.opener(shared.bundle / "model.onnx")() as a, far.opener(shared.bundle / "model.onnx")() as b:
        np.testing.assert_array_equal(a.infer(images), b.infer(images))
        assert b.time_ms() > 0
        assert isinstance(b, TimedTogether) and min(b.times_ms([b] * 5)) > 0
        assert far.runtime.gpu_state() is None, "nothing tells on a CPU"  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="takes"):
            b.infer(images[:, :1])
        np.testing.assert_array_equal(a.infer(images), b.infer(images))  # an error does not end the connection


def test_a_connection_that_nothing_uses_any_more_leaves_the_board(there: Server, tmp_path: Path) -> None:
    """As between two builds of a sweep in one process."""
    for _ in range(2):
        target_for("cpu", work=tmp_path, host=_host(there))


def _host(there: Server) -> Host:
    return Host(there.address, str(there.program))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--host", "-oProxyCommand=true"), "is not a host"),
        (("--host", "nobody at all"), "is not a host"),
        (("--host", "ADDRESS", "--host-program", "/nowhere/edgeprune"), "has no /nowhere/edgeprune"),
        (("--host", "ADDRESS", "--host-program", "echo hello; false"), "sent an invalid reply"),
        (("--host", "ADDRESS", "--device", "orin-nano"), "is not this machine"),
        (("--host", "ADDRESS", "--simulate"), "leave out --host"),
    ],
)
def test_what_fails_is_named(
    options: tuple[str, ...], reason: str, there: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [there.address if o == "ADDRESS" else o for o in options]
    if "--host-program" not in given:
        given += ["--host-program", str(there.program)]
    code, _, err = call(capsys, "build", *given, "--work", tmp_path, "--out", tmp_path / "out")
    assert code == 1 and reason in err and len([x for x in err.splitlines() if x.startswith("error")]) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_key_and_closed_port(
    there: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(there.ssh.split()[-1]).read_text()
    for change, reason in (
        (("/known", "/unknown"), "Host key verification failed"),
        (("/user", "/nokey"), "Permission denied"),
        (("Port ", "Port 1 #"), "Connection refused"),
    ):
        other = tmp_path / "config"
        other.write_text(config.replace(*change))
        monkeypatch.setenv("EDGEPRUNE_SSH", f"ssh -F {other}")
        code, _, err = call(capsys, "profile", *there.options, "--work", tmp_path, "--out", tmp_path / "s.json")
        assert code == 1 and reason in err and f"ssh {there.address} true" in err
    monkeypatch.setenv("EDGEPRUNE_SSH", "no-such-ssh")
    code, _, err = call(capsys, "profile", *there.options, "--work", tmp_path, "--out", tmp_path / "s.json")
    assert code == 1 and "install the OpenSSH client" in err


def test_a_lost_connection_is_reported_and_the_build_goes_on(
    there: Server,
    shallow: Shallow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The worker is killed in the middle of measuring; the same command then finishes with the rest."""
    command = build_on(there, shallow, tmp_path)
    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, getattr(os, name))  # after_saves leaves its own there
        kill = ["pkill", "-f", f"^{sys.executable} {there.program} worker"]
        after_saves(2, lambda: subprocess.run(kill, check=True))
        code, _, err = call(capsys, *command, "--json")
    assert code == 1, err
    assert "the connection was cut" in err.splitlines()[-1] or "ended early" in err.splitlines()[-1]
    assert not (tmp_path / "bundle").exists()
    code, out, err = call(capsys, *command, "--json")
    assert code == 0, err
    assert "staircase: resuming" in err
    assert load_bundle(tmp_path / "bundle").report.probes == json.loads(out.splitlines()[-1])["probes"]


@pytest.mark.parametrize(
    ("error", "closed"),
    [(EngineError(), True), (HostError(), False), (OutputError(), False), (KeyboardInterrupt(), False)],
)
def test_a_session_is_closed_unless_the_connection_may_be_out_of_step(error: BaseException, closed: bool) -> None:
    """`--precision auto` goes on after an EngineError, whose engines would fill the memory of the device."""
    asked: list[protocol.Message] = []

    def ask(request: protocol.Message, kind: object) -> None:
        asked.append(request)
        raise HostError("a failure to close hides no error")

    runtime: Any = SimpleNamespace(ask=ask)
    with pytest.raises(type(error)) as raised, RemoteSession(runtime, protocol.Opened(3, None)):
        raise error
    assert raised.value is error and asked == [protocol.Close(3)] * closed


# ---- the worker by itself


def spoken(tmp_path: Path, *requests: protocol.Message) -> list[protocol.Answer]:
    """What a worker answers, its log lines left out."""
    asked, answered = io.BytesIO(), io.BytesIO()
    for request in requests:
        protocol.write(asked, request)
    asked.seek(0)
    serve(asked, answered, tmp_path / "worker")
    answered.seek(0)
    found = []
    while (answer := protocol.read_answer(answered)) is not None:
        if not isinstance(answer, protocol.Logged):
            found.append(answer)
    return found


def prepare(**changed: Any) -> protocol.Prepare:
    fields: dict[str, Any] = {"version": __version__, "device": load_device("cpu"), "precision": "fp32", "batch": 1}
    return protocol.Prepare(**fields | changed)


def test_versions_must_be_equal(tmp_path: Path) -> None:
    [answer] = spoken(tmp_path, prepare(version="0.0.1"))
    assert isinstance(answer, protocol.Failed) and answer.kind == "HostError" and "install the same" in answer.text


def test_files_are_kept_by_hash_and_refused_where_they_differ(tmp_path: Path) -> None:
    good, bad = sha256_bytes(b"one two"), sha256_bytes(b"other")
    answers = spoken(
        tmp_path,
        prepare(),
        protocol.Missing((good,)),
        protocol.Put(good, b"one ", False),
        protocol.Put(good, b"two", True),
        protocol.Missing((good, bad)),
        protocol.Put(bad, b"one two", True),
        protocol.Missing((bad,)),
        protocol.Get(good),
    )
    assert [type(a).__name__ for a in answers] == ["Ready", "Names", "Done", "Names", "Failed", "Names", "Put"]
    assert answers[1] == protocol.Names((good,)) and answers[3] == protocol.Names((bad,)) == answers[5]
    assert answers[6] == protocol.Put(good, b"one two", True)
    left = {path.name for path in (tmp_path / "worker" / "files").iterdir()}
    assert left == {good}


def test_half_a_file_is_not_left_behind(tmp_path: Path) -> None:
    """Neither by a transfer that is cut off nor by a worker that was killed."""
    folder = tmp_path / "worker" / "files"
    folder.mkdir(parents=True)
    (folder / ".killed.1.tmp").write_bytes(b"half")
    spoken(tmp_path, prepare(), protocol.Put(sha256_bytes(b"one two"), b"one ", False))
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", ".hidden", "a/b", ""])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    digest = sha256_bytes(b"x")
    requests = (
        prepare(),
        protocol.Put(digest, b"x", True),
        protocol.Open({name: digest}, name),
        protocol.Get("../" + digest[3:]),
    )
    answers = spoken(tmp_path, *requests)
    assert [type(a).__name__ for a in answers] == ["Ready", "Done", "Failed", "Failed"]
    assert "is not a file name" in answers[2].text and "is not a sha256" in answers[3].text  # type: ignore[union-attr]


@pytest.mark.parametrize("junk", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02hi", b"\x00\x00\x00\x09{}", b"\x00"])
def test_a_message_that_is_none_ends_the_worker(junk: bytes, tmp_path: Path) -> None:
    answered = io.BytesIO()
    serve(io.BytesIO(junk), answered, tmp_path)
    answered.seek(0)
    answer = protocol.read_answer(answered)
    assert answer is None or (isinstance(answer, protocol.Failed) and "install the same" in answer.text)
    assert protocol.read_answer(answered) is None


def test_clocks_come_back_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked on request, restored when the workstation is gone."""
    ran: list[str] = []
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("edgeprune.devices.power.run", lambda line, timeout_s=20: ran.append(line) or "")
    device = msgspec.structs.replace(load_device("cpu"), clocks_query="jetson_clocks --show")
    spoken(tmp_path, prepare(device=device, lock_clocks=True))
    assert [line.split()[0:2] for line in ran][:3] == [
        ["jetson_clocks", "--store"],
        ["jetson_clocks"],
        ["jetson_clocks", "--restore"],
    ]


@pytest.mark.parametrize("ends", ["exit 255", "echo Killed >&2; exit 137"])
def test_a_worker_that_is_killed_may_have_run_out_of_memory(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh ends with 255 and says nothing where the process there was killed, a shell there with 137."""
    monkeypatch.setenv("EDGEPRUNE_SSH", f"sh -c '{ends}' ssh")
    with Channel(Host("jetson@nano"), "edgeprune worker") as channel:
        assert "out-of-memory killer" in str(channel.failure())


def test_a_board_in_use_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "WAIT_S", 0.1)
    with busy.machine():
        [answer] = spoken(tmp_path, prepare())
    assert isinstance(answer, protocol.Failed) and answer.kind == "HostError"
    assert "is using this board" in answer.text and "wait until it ends" in answer.text and "\n" not in answer.text
    for _ in range(2):  # free again, and again after a session
        assert isinstance(spoken(tmp_path, prepare())[0], protocol.Ready)


def hold_and_die(folder: str) -> None:
    tempfile.tempdir = folder
    with busy.machine():
        die()


def test_a_killed_worker_leaves_the_board(tmp_path: Path) -> None:
    process = fork(hold_and_die, str(tmp_path))
    process.join()
    assert process.exitcode == -9 and isinstance(spoken(tmp_path, prepare())[0], protocol.Ready)


class OnDevice:
    """A session of the worker that notes when it is timed."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def time_ms(self) -> float:
        self.order.append(self.name)
        return 10.0

    def memory_bytes(self) -> int:
        return 123

    def __enter__(self) -> OnDevice:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_many_timings_are_one_request(tmp_path: Path) -> None:
    """Clocks that fell since the last request rise before the first that counts; a timing is two inferences."""
    order: list[str] = []
    worker = Worker(tmp_path, lambda message: None)
    worker.opened = {0: OnDevice("a", order), 1: OnDevice("b", order)}  # type: ignore[dict-item]
    answer = worker.answer(protocol.Time((1, 0, 0, 1)))
    assert answer == protocol.Times((10.0,) * 4)
    assert order[:-4] == ["b"] * int(RAMP_MS / 20) and order[-4:] == ["b", "a", "a", "b"]


def test_nothing_else_runs_while_it_is_timed(tmp_path: Path) -> None:
    order: list[str] = []

    @contextmanager
    def alone() -> Iterator[None]:
        order.append("alone")
        yield
        order.append("together")

    worker = Worker(tmp_path, lambda message: None, alone)
    worker.opened = {0: OnDevice("a", order)}  # type: ignore[dict-item]
    worker.answer(protocol.Time((0,)))
    assert order[0] == "alone" and order[-1] == "together" and set(order[1:-1]) == {"a"}


def test_the_state_of_the_gpu_and_the_memory_of_a_session_are_told(tmp_path: Path) -> None:
    state = GpuState(clock_mhz=1020.0, temperature_c=60.0, throttles=("heat, gpu",), events={"heat, gpu": 2})

    class Runtime:
        def gpu_state(self) -> GpuState:
            return state

        def open(self, path: Path, setup: object) -> Any:
            return OnDevice("a", [])

    worker = Worker(tmp_path, lambda message: None)
    worker.runtime, worker.setup = Runtime(), None  # type: ignore[assignment]
    worker.models.mkdir(), worker.files.mkdir()
    digest = sha256_bytes(b"x")
    (worker.files / digest).write_bytes(b"x")
    assert worker.answer(protocol.State()) == protocol.StateIs(state)
    assert worker.answer(protocol.Open({"model.engine": digest}, "model.engine")) == protocol.Opened(0, 123)
    worker.runtime = object()  # type: ignore[assignment]
    assert worker.answer(protocol.State()) == protocol.StateIs(None)
