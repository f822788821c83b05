"""The connection to Ray: local, that of this machine, or an address; checks that all nodes run the same code."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.errors import EdgepruneError, HostError, InputError, MissingError, install

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

LOCAL, AUTO = "local", "auto"
CONNECT_S, ANSWER_S = 5, 120
NAMESPACE = "edgeprune"


@dataclass(frozen=True)
class Cluster:
    """A connection that is open; Ray itself keeps it, once for each process."""

    address: str


@contextmanager
def connected(address: str | None) -> Iterator[Cluster | None]:
    """Connect to Ray and disconnect at the end, in any case; None without an address.

    With `auto`, a connection that this process already has (ray.init) is used and left open.
    Raises MissingError without Ray, InputError for a bad address, HostError where the cluster cannot be reached or
    its nodes run other versions.
    """
    if address is None:
        yield None
        return
    ray = ray_module()
    if address not in (LOCAL, AUTO):
        _check_reachable(address)
    if address == AUTO and ray.is_initialized():
        check_nodes(ray)
        yield Cluster(address)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL, **options
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError, AssertionError, OSError) as error:
        raise HostError(_why(address, error)) from None
    try:
        check_nodes(ray)
        yield Cluster(address)
    finally:
        ray.shutdown()


def ray_module() -> Any:
    """The module ray. Raises MissingError."""
    try:
        import ray
    except ImportError as error:
        raise MissingError(f"--ray needs Ray ({error}): {install('ray')}") from None
    return ray


def _check_reachable(address: str) -> None:
    """Raise InputError for something other than HOST:PORT, HostError where nothing listens: Ray waits for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or "/" in host:
        raise InputError(
            f"--ray {address!r} is not an address: pass local, auto or HOST:PORT of the cluster's head node"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise HostError(
            f"no Ray cluster answers at {address} ({error}): start one there with `ray start --head`"
        ) from None


def _why(address: str, error: Exception) -> str:
    """What Ray's error means for the user, in one line."""
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return f"the cluster at {address} runs another version of Ray or Python ({text[:300]}): install it here"
    if address == AUTO:
        return f"no Ray cluster runs on this machine ({text[:160]}): start one with `ray start`, or pass --ray local"
    return f"Ray at {address} cannot be used from this machine ({text[:300]}): join it with `ray start --address=…`"


def on_node(node_id: str) -> Any:
    """The scheduling strategy that runs something on one node and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _check_cpus(ray: Any) -> None:
    """Raise HostError where no node has a CPU: Ray would wait for one for ever."""
    if not any(node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes() if node["Alive"]):
        raise HostError(
            "no node of the Ray cluster has a CPU, so nothing can be evaluated there: start one with "
            "`ray start --address=HOST:PORT --num-cpus=N`, and the head with --num-cpus too if it is to evaluate"
        )


def check_nodes(ray: Any) -> None:
    """Raise HostError where no node has a CPU, or one has another edgeprune, torch or timm than this process."""
    _check_cpus(ray)

    def about() -> dict[str, str]:  # sent by value, so that it runs where edgeprune is missing
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for name in ("torch", "timm"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "missing"
        try:
            from edgeprune.devices import this_machine
            from edgeprune.io import code_key
            from edgeprune.version import __version__

            return found | {"edgeprune": __version__, "code": code_key(), "processor": this_machine()}
        except ImportError:
            return found | {"edgeprune": "missing", "code": "", "processor": ""}

    task = ray.remote(num_cpus=0, max_retries=0)(about)
    asked = []
    for node in ray.nodes():
        if node["Alive"]:
            answer = task.options(scheduling_strategy=on_node(node["NodeID"])).remote()
            asked.append((node["NodeID"], node["NodeManagerAddress"], answer))
    own = about()
    for node_id, name, answer in asked:
        try:
            found = ray.get(answer, timeout=ANSWER_S)
        except ray.exceptions.RayError as error:
            if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id):
                log.warning("node %s has left the cluster", name)
                continue
            detail = " ".join(str(error).split())[:160]
            raise HostError(f"node {name} of the cluster does not answer ({detail}): restart Ray there") from None
        if problem := difference(own, found):
            raise HostError(f"node {name} of the cluster has {problem}: install the same version there")
        if found["processor"] != own["processor"]:
            log.warning(
                "node %s has another processor (%s): results may differ in the last bits",
                name, found["processor"],
            )  # fmt: skip


def difference(own: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """What a node has that this process has not; None where both run the same code."""
    for name in ("edgeprune", "torch", "timm"):
        if found[name] != own[name]:
            return f"{name} {found[name]}, not {own[name]}"
    return f"other sources of edgeprune {own['edgeprune']}" if found["code"] != own["code"] else None


def stored(pixels: NDArray[np.uint8], step: int) -> list[Any]:
    """Pictures (images, H, W, 3) in Ray's object store, as blocks of `step`, which tasks get by reference."""
    return [ray_module().put(pixels[start : start + step]) for start in range(0, len(pixels), step)]


def received(answers: Sequence[Any]) -> list[Any]:
    """The results of tasks, in order. Raises the EdgepruneError that a task raised, HostError for any other."""
    ray = ray_module()
    try:
        found: list[Any] = ray.get(list(answers))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EdgepruneError):
            raise error.cause from None
        detail = " ".join(str(error.cause).split())[:200]
        raise HostError(f"an evaluation failed on a node of the cluster ({detail}): fix it there") from None
    except ray.exceptions.RayError as error:
        detail = " ".join(str(error).split())[:200]
        raise HostError(f"Ray lost an evaluation ({detail}): run the command again to continue") from None
    return found
