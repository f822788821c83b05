"""Ray, for real: several nodes on this machine. Nodes, boards and drivers die; results stay those of one process."""

from __future__ import annotations

import copy
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from support.builds import Shallow, call, few_digits
from support.loopback import Server
from support.processes import command, fork
from support.rays import ROUNDS, DyingBoard, MeetingBoard, NotingBoard, SharedBoard, marked, named, sweep_and_die

import edgeprune
from edgeprune import zoo
from edgeprune.bundles.format import STAIRCASE, load_bundle
from edgeprune.distributed.cluster import check_nodes, connected, difference
from edgeprune.distributed.engines import can_spread, spread_logits, stored
from edgeprune.errors import EdgepruneError, HostError, MissingError
from edgeprune.images import load_images, load_pixels
from edgeprune.io import load
from edgeprune.latency.staircase import SampleKey
from edgeprune.records import Staircase
from edgeprune.runtimes.inference import logits_of
from edgeprune.runtimes.target import target_for
from edgeprune.sweeps import on_ray
from edgeprune.sweeps.on_ray import Boards
from edgeprune.sweeps.plan import HERE, Job, jobs_of
from edgeprune.sweeps.run import InProcess, Outcome, run_sweep

ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
from ray.cluster_utils import Cluster  # noqa: E402

DENSE = (197,) * 12
SINGLE = [((197,) * block + (n,) * (12 - block), DENSE) for block in range(0, 12, 2) for n in (60, 120)]
WHOLE = [(t, t) for t in ((197,) * 6 + (90,) * 3 + (30,) * 3, (197,) * 6 + (90,) * 6)]
STORE = {"object_store_memory": 80_000_000}
QUIET = {"include_log_monitor": False}
# A node that is killed is found dead after two seconds instead of fifteen; workers start when there is work for them.
SYSTEM = {"health_check_period_ms": 400, "health_check_initial_delay_ms": 1000, "enable_worker_prestart": False}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head without CPUs, where the driver is, and a node of one CPU; what comes with `both` has two."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # workers find the boards of these tests
        head = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True, **QUIET, "_system_config": SYSTEM}
        found = Cluster(initialize_head=True, head_node_args=head | STORE)
        found.add_node(num_cpus=1, **QUIET, **STORE)
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def both(nodes: Any) -> Any:
    """The nodes with a second one of one CPU. Every process of Ray that imports torch takes seconds."""
    nodes.add_node(num_cpus=1, **QUIET, **STORE)
    return nodes


@pytest.fixture(scope="module")
def joined(nodes: Any) -> Iterator[Any]:
    """This process as a driver; tests that connect on their own stand before the first that needs this."""
    with connected(nodes.address) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def evaluation() -> Any:
    """The embedded model, 40 pictures (two blocks, three chunks) and their labels."""
    from edgeprune.vit.models import load_model

    model, found = load_model(zoo.EMBEDDED), load_images(zoo.images_dir() / "labels.csv")
    assert found.labels is not None
    return model, load_pixels(found.paths[:40], model.preprocessing), list(found.labels[:40])


@pytest.fixture(scope="module")
def alone(evaluation: Any) -> Any:
    """Figures of one process, with several threads, and its evaluator."""
    import torch

    from edgeprune.vit.fidelity import Evaluator

    model, pixels, labels = evaluation
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        evaluator, found = Evaluator(model, "fold", pixels, labels), []
        for tokens, base in [*SINGLE, *WHOLE]:
            evaluator.base(base)
            found.append((tokens, evaluator.fidelity(tokens)))
        return evaluator, found
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def jobs(shallow: Shallow, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, ...]:
    """Two simulated builds of a small model."""
    folder = tmp_path_factory.mktemp("sweep")
    few_digits(folder / "digits")
    (folder / "small.toml").write_text(
        f'models = ["{shallow.model}"]\nimages = "digits/labels.csv"\nmethods = ["topk"]\nsearch_images = 4\n'
        "goals = [{ alpha = 0.5 }, { alpha = 0.3 }]\nneighbours = 0\n"
        'devices = [{ name = "orin-nano", simulate = true }]\n'
    )
    return jobs_of(folder / "small.toml")


@pytest.fixture(scope="module")
def undisturbed(jobs: tuple[Job, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The first bundle and the manifests of these builds, made in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = manifests(run_sweep(jobs, InProcess(), folder / "work", folder / "out"))
    return folder / "out" / jobs[0].name, found


def manifests(outcomes: Sequence[Outcome]) -> list[Any]:
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return [load_bundle(Path(str(outcome.bundle))) for outcome in outcomes]


# --- what is said when something is wrong ---


def test_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code, _, err = call(capsys, "build", "--ray", address)
    assert code == 1 and len(err.splitlines()) == 1
    assert f"no Ray cluster answers at {address}" in err and "ray start --head" in err


@pytest.mark.parametrize("address", ["", "head", "ray://head:10001", "head:x"])
def test_no_address(address: str) -> None:
    with pytest.raises(EdgepruneError, match="pass local, auto or HOST:PORT"), connected(address):
        pass


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match=r'--ray needs Ray .*pip install "\.\[ray\]"'), connected("local"):
        pass


def test_another_version_of_ray(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.0.0")
    with pytest.raises(HostError, match="another version of Ray or Python"), connected(nodes.address):
        pass
    assert not ray.is_initialized()


def test_differences_are_named() -> None:
    own = {"edgeprune": "1", "torch": "2", "timm": "3", "code": "4", "processor": "5"}
    assert difference(own, own | {"processor": "6"}) is None
    assert difference(own, own | {"torch": "missing"}) == "torch missing, not 2"
    assert difference(own, own | {"edgeprune": "0", "code": "9"}) == "edgeprune 0, not 1"


def test_a_cluster_without_cpus() -> None:
    """Ray would wait for one for ever."""
    node = {"Alive": True, "Resources": {"memory": 1.0}}
    for nodes in ([], [node], [node, {"Alive": False, "Resources": {"CPU": 4.0}}]):
        with pytest.raises(HostError, match=r"no node of the Ray cluster has a CPU.*ray start"):
            check_nodes(SimpleNamespace(nodes=lambda nodes=nodes: nodes))


def test_ctrl_c_leaves_no_process_and_no_lock(shallow: Shallow, tmp_path: Path) -> None:
    """A build on a Ray of its own, interrupted in the middle of a staircase."""
    environment = {"EDGEPRUNE_TEST_MARK": str(tmp_path), "RAY_enable_worker_prestart": "0"}
    few, work = few_digits(tmp_path / "digits"), tmp_path / "work"
    work.mkdir()
    shallow.work(work)
    build = ("build", "--model", shallow.model, "--images", few, "--method", "topk", "--work", work, "--ray", "local")
    code, _, err = command(tmp_path, *build, "--out", tmp_path / "bundle", interrupt_after=2, **environment)
    assert code == 130, err
    for _ in range(600):  # Ray's agents look now and then whether their raylet lives
        if not (left := marked("EDGEPRUNE_TEST_MARK", str(tmp_path))):
            break
        time.sleep(0.1)
    assert not left
    from edgeprune.runtimes.steps import WorkFolder

    with WorkFolder(work).lock():
        assert list(work.glob("samples-*.json")), "it goes on from there"


# --- the same results, whatever dies ---


def test_another_edgeprune_on_a_node(joined: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.io.code_key", lambda: "other sources")
    with pytest.raises(HostError, match=r"node [\d.]+ of the cluster has other sources of edgeprune"):
        check_nodes(ray)


def test_board_is_killed_in_a_staircase_then_the_driver(
    nodes: Any,
    joined: Any,
    jobs: tuple[Job, ...],
    undisturbed: tuple[Path, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver dies when the first build has ended; another one goes on with the second."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    driver = fork(sweep_and_die, nodes.address, jobs, work, out)
    driver.join()
    assert driver.exitcode == -9
    saved, _ = msgspec.json.decode((work / "died").read_bytes())
    assert saved, "the board had measured something when it died"
    monkeypatch.setattr(on_ray, "Board", SharedBoard)
    ran: list[str] = []
    watch: Any = lambda job, state: ran.append(job.name)  # noqa: E731
    outcomes = run_sweep(jobs, Boards(joined), work, out, resume=True, watch=watch)
    assert manifests(outcomes) == undisturbed[1], "probes are counted, too"
    assert set(ran) == {jobs[1].name}, "the first had its result"


def test_bits_are_those_of_one_process(joined: Any, both: Any, evaluation: Any, alone: Any) -> None:
    from edgeprune.distributed.evaluate import SpreadEvaluator

    model, pixels, labels = evaluation
    module = copy.deepcopy(model.module)  # of a class in the user's script, which a node finds nowhere
    module.__class__ = type("Own", (type(module),), {"__module__": "__main__"})
    model = replace(model, module=module)
    evaluator, wanted = alone
    spread = SpreadEvaluator(model, "fold", pixels, labels)
    np.testing.assert_array_equal(spread.dense_logits, evaluator.dense_logits)
    assert list(spread.fidelities([*SINGLE, *WHOLE])) == wanted
    [(_, logits)] = spread.logits(WHOLE[:1])
    np.testing.assert_array_equal(logits, evaluator.logits(WHOLE[0][0]))
    others = SpreadEvaluator(model, "fold", np.ascontiguousarray(pixels[::-1]), labels[::-1])
    np.testing.assert_array_equal(others.dense_logits.argmax(1), evaluator.dense_logits[::-1].argmax(1))


@pytest.mark.parametrize(
    ("schedules", "blocks", "cpus", "size"), [(64, 2, 2, 8), (32, 1, 2, 4), (3, 1, 2, 1), (200, 4, 64, 3)]
)
def test_every_cpu_gets_several_tasks(schedules: int, blocks: int, cpus: int, size: int) -> None:
    from edgeprune.distributed.evaluate import group_size

    assert group_size(schedules, blocks, cpus) == size


def test_recovery_is_that_of_one_process(joined: Any, both: Any, evaluation: Any) -> None:
    from edgeprune.distributed.evaluate import SpreadOutputs
    from edgeprune.vit.fidelity import pruned_module
    from edgeprune.vit.recovery import Recipe, recovered

    model, pixels, _ = evaluation
    pruned = pruned_module(model, "fold", (197,) * 6 + (60,) * 5 + (20,))
    recipe = Recipe(epochs=1, least_steps=1, validation=0.9)  # 36 pictures are held out: two tasks
    given = (pruned, pixels, model.preprocessing, recipe)
    wanted, found = recovered(*given), recovered(*given, outputs=SpreadOutputs())
    assert found.record == wanted.record and len(set(found.record.curve)) == 2


def test_outputs_of_an_engine_are_those_of_one_process(
    joined: Any, both: Any, undisturbed: Any, evaluation: Any
) -> None:
    model, pixels, _ = evaluation
    pixels = np.concatenate([pixels, pixels[::-1]])  # two tasks
    folder, _ = undisturbed
    target = target_for("orin-nano", batch=1, simulate=True)
    assert can_spread(target)
    with target.runtime.open(folder / "model.onnx", target.setup) as session:
        wanted = logits_of(session, pixels, model.preprocessing, 1)
    blocks = stored(pixels, 1)
    found = spread_logits(target, folder / "model.onnx", blocks, model.preprocessing)
    np.testing.assert_array_equal(found, wanted)
    assert len(blocks) == 2 and all(isinstance(block, ray.ObjectRef) for block in blocks), "kept for other engines"


def test_build_from_python(joined: Any, jobs: tuple[Job, ...], undisturbed: Any, tmp_path: Path) -> None:
    """It uses the connection of this process, leaves it open, and gives the bundle of one process."""
    given = jobs[0].options(tmp_path, tmp_path)
    bundle = edgeprune.build(
        given.model, device=given.device, images=given.images, goal=given.goal, method=given.method, simulate=True,
        search_images=given.search_images, neighbours=given.neighbours, ray="auto", work=tmp_path / "work",
        out=tmp_path / "bundle",
    )  # fmt: skip
    assert bundle.manifest == undisturbed[1][0]
    assert ray.is_initialized()


def test_board_behind_ssh_is_killed_in_a_staircase(
    joined: Any, there: Server, shallow: Shallow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had measured is part of what is measured in the end, and nothing runs on the board any more."""
    few_digits(tmp_path / "digits")
    (tmp_path / "hosts.toml").write_text(
        f'[[to]]\nhost = "{there.address}"\ndir = "x"\nprogram = "{there.program}"\ndevice = "cpu"\n'
    )
    (tmp_path / "s.toml").write_text(
        f'models = ["{shallow.model}"]\nimages = "digits/labels.csv"\nmethods = ["topk"]\nsearch_images = 4\n'
        'goals = [{ alpha = 0.5 }]\nneighbours = 0\nrounds = 5\ndevices = ["cpu"]\nhosts = "hosts.toml"\n'
    )
    [job] = jobs_of(tmp_path / "s.toml")
    work = tmp_path / "work"
    shallow.work(job.options(work, tmp_path).work)
    (work / "ssh").write_text(there.ssh)
    monkeypatch.setattr(on_ray, "Board", DyingBoard)
    [manifest] = manifests(run_sweep([job], Boards(joined), work, tmp_path / "out"))
    assert manifest.engine.setup.runtime == "ort-cpu"
    pairs, _ = msgspec.json.decode((work / "died").read_bytes(), type=tuple[list[tuple[SampleKey, list[float]]], Any])
    before = {key.tokens[0]: ms for key, ms in pairs if key.kind == "trunk" and ms}
    staircase = load(tmp_path / "out" / job.name / STAIRCASE, Staircase)
    points = {point.tokens: list(point.latency.samples_ms) for point in staircase.points}
    assert before and all(points[n][: len(ms)] == ms for n, ms in before.items())
    assert max(map(len, points.values())) == ROUNDS, "no sample is counted twice"
    for _ in range(100):
        if not named(f"{there.program}"):
            break
        time.sleep(0.1)
    assert not named(f"{there.program}")


def test_boards_take_turns(
    joined: Any, jobs: tuple[Job, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One build at a time on a board, boards side by side, this machine alone and last."""
    monkeypatch.setattr(on_ray, "Board", MeetingBoard)
    turns = [(board, n) for board in (HERE, "a", "b") for n in (1, 2)]
    many = [msgspec.structs.replace(jobs[0], name=f"{board} {n}", board=board) for board, n in turns]
    outcomes = run_sweep(many, Boards(joined), tmp_path, tmp_path)
    busy = {each.job.name: tuple(map(float, str(each.error).split())) for each in outcomes}
    for board in (HERE, "a", "b"):
        assert busy[f"{board} 1"][1] <= busy[f"{board} 2"][0]
    others = [end for name, (_, end) in busy.items() if not name.startswith(HERE)]
    assert max(others) <= busy[f"{HERE} 1"][0]
    assert busy["a 1"][0] < busy["b 1"][1] and busy["b 1"][0] < busy["a 1"][1], "side by side"


def test_a_board_in_use_fails_its_own_builds_alone(
    joined: Any, jobs: tuple[Job, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "Board", NotingBoard)
    monkeypatch.setattr(on_ray, "NAMED", 2)
    other = ray.remote(NotingBoard).options(num_cpus=0, name="board a").remote()
    many = [
        msgspec.structs.replace(jobs[0], name=f"{board} {n}", board=board) for board in ("a", "b") for n in (1, 2)
    ]
    outcomes = run_sweep(many, Boards(joined), tmp_path, tmp_path)
    ray.kill(other)
    said = {outcome.job.name: str(outcome.error) for outcome in outcomes}
    assert all("the board a is in use by another sweep" in said[name] for name in ("a 1", "a 2"))
    assert all(len(said[name].split()) == 2 for name in ("b 1", "b 2")), "they were built"


def test_node_is_killed_in_a_search(both: Any, joined: Any, evaluation: Any, alone: Any) -> None:
    from edgeprune.distributed.evaluate import SpreadEvaluator

    spread, found = SpreadEvaluator(*evaluation[:1], "fold", *evaluation[1:]), []
    victim = next(node for node in both.list_all_nodes() if node is not both.head_node)
    for each in spread.fidelities([*SINGLE, *WHOLE]):
        if not found:
            both.remove_node(victim, allow_graceful=False)
        found.append(each)
    assert found == alone[1]
