"""Untrusted files: whatever stands in a manifest, staircase, schedule, TOML, CSV, array or ONNX, one error comes out.

Two ways: properties with hypothesis over what decodes, and some ten thousand seeded mutations of real files (`make
fuzz`: twenty times as many others), each then used as the commands use it. Only EdgepruneError may leave; what is
accepted must be usable.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgeprune import devices
from edgeprune.bundles.format import load_bundle
from edgeprune.bundles.ship import fleet
from edgeprune.cli import rows
from edgeprune.cli import tables as report
from edgeprune.devices import parse
from edgeprune.errors import EdgepruneError
from edgeprune.html_report.page import page_html
from edgeprune.images import load_images, read_image
from edgeprune.io import decode, encode, load_array, sha256_bytes
from edgeprune.latency import profiling
from edgeprune.latency.staircase import predict_ms, treads
from edgeprune.onnx_graph.graph import fix_tokens, precision_of
from edgeprune.onnx_graph.graph import load_graph as load_onnx
from edgeprune.pipeline.compile import described
from edgeprune.pipeline.profile import vit_of
from edgeprune.records import (
    BuildTrace,
    Candidate,
    Device,
    Engine,
    Latency,
    Manifest,
    Preprocessing,
    Report,
    Sample,
    Schedule,
    Staircase,
    Trial,
)
from edgeprune.runtimes.kernel_times import latency_ms
from edgeprune.runtimes.simulated import operations_of_ends
from edgeprune.runtimes.target import target_for
from edgeprune.scheduling.goals import Goal
from edgeprune.scheduling.paper import paper_schedule

ROUGH = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    1e308,
    -1e-308,
    "",
    "..",
    "/etc/passwd",
    "a/../b",
    "\0",
    "é" * 300,
    [],
    {},
    [[]],
]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def attempts(use: Callable[[], Any]) -> bool:
    """Did it work? Any error but ours fails the test."""
    try:
        use()
    except EdgepruneError as error:
        assert str(error), "an error says what is wrong"
        return False
    return True


class Amount(NamedTuple):
    """How many mutations a test makes, and from which seed."""

    factor: int
    seed: int

    def trees(self, document: Any, count: int) -> list[bytes]:
        """JSON documents with values replaced, removed, repeated or added."""
        return [json.dumps(tree).encode() for tree in trees(document, count * self.factor, self.seed)]

    def noise(self, data: bytes, count: int) -> list[bytes]:
        """Copies of a file, cut short, with bytes changed, doubled or put in."""
        return list(noise(data, count * self.factor, self.seed))


@pytest.fixture(params=[Amount(1, 0), pytest.param(Amount(20, 1), marks=pytest.mark.slow)], ids=["quick", "long"])
def some(request: pytest.FixtureRequest) -> Amount:
    """The usual number of mutations, and for `make fuzz` many more of another seed."""
    amount: Amount = request.param
    return amount


def trees(document: Any, count: int, seed: int) -> Iterator[Any]:
    """Copies of a JSON document, each with one to three values replaced, removed, repeated or added."""
    rng = random.Random(seed)
    for _ in range(count):
        copy = json.loads(json.dumps(document))
        for _ in range(rng.randint(1, 3)):
            node = copy
            while isinstance(node, dict | list) and node:
                key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
                inner = node[key]
                if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
                    action = rng.random()
                    if action < 0.7:
                        value = json.loads(json.dumps(rng.choice(ROUGH)))
                        node[key] = inner * -3 if rng.random() < 0.2 and isinstance(inner, int | float) else value
                    elif action < 0.85:
                        del node[key]
                    elif isinstance(node, list):
                        node.extend(json.loads(json.dumps([inner] * rng.randint(1, 50))))
                    else:
                        node[f"{key}x"] = 1
                    break
                node = inner
        yield copy


def noise(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies of a file, cut short, with bytes changed, doubled or put in."""
    rng = random.Random(seed)
    for _ in range(count):
        piece = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            if not piece:
                break
            place, action = rng.randrange(len(piece)), rng.random()
            if action < 0.3:
                piece[place] = rng.randrange(256)
            elif action < 0.5:
                del piece[place:]
            elif action < 0.7:
                piece[place:place] = piece[place : place + rng.randint(1, 40)]
            elif action < 0.9:
                piece[place : place + 1] = rng.choice(
                    [b"9" * 40, b"-", b'"', b"{[", b"\xff\xfe", b"\n,,", b"../", b"1e999"]
                )
            else:
                del piece[place : place + rng.randint(1, 30)]
        yield bytes(piece)


@pytest.fixture(scope="module")
def staircase() -> Staircase:
    """The simulated one of the embedded model."""
    return profiling.simulated_staircase(target_for("orin-nano", simulate=True), vit_of("vit_digits"))


@pytest.fixture(scope="module")
def manifest(staircase: Staircase) -> Manifest:
    """Of a bundle whose one file is its engine."""
    vit, ms = staircase.vit, Latency(samples_ms=(1.0, 2.0, 3.0))
    digest = sha256_bytes(b"engine")
    return Manifest(
        edgeprune="0.1.0",
        vit=vit,
        engine=Engine(path="model.onnx", sha256=digest, onnx_sha256=digest, size_bytes=6, setup=staircase.setup),
        schedule=Schedule(vit=vit, method="fold", policy="search", tokens=(vit.tokens,) * vit.depth),
        report=Report(latency=ms, dense_latency=ms, speedup=1.0, speedup_interval=(0.9, 1.1)),
        preprocessing=Preprocessing(
            image_px=28, resize_px=28, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
        ),
        labels=tuple("0123456789"),
        files={"model.onnx": digest},
        tolerance=1e-3,
    )


def use_staircase(data: bytes) -> None:
    """All that `schedule`, `profile` and a page ask of it."""
    found = decode(data, Staircase, "staircase.json")
    vit = found.vit
    ends = treads(found)
    assert ends[-1] == vit.tokens
    predict_ms(found, (vit.tokens,) * vit.depth, "fold")
    rows.profile_row(found, Path("s.json"))
    paper_schedule(found, "pomt", Goal(alpha=0.5), lambda n: 50.0, 0)


def use_manifest(data: bytes, folder: Path) -> None:
    """All that a command asks of a bundle before it opens the engine."""
    (folder / "manifest.json").write_bytes(data)
    found = load_bundle(folder)
    json.dumps(rows.row_of(found.engine.setup, found.schedule, found.report, folder), allow_nan=False)
    report.build_table(found)
    assert (folder / found.engine.path).resolve().is_relative_to(folder.resolve())
    assert described(folder / "model.onnx")[0].vit == found.vit


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutated_staircases(some: Amount, staircase: Staircase) -> None:
    data = encode(staircase)
    mutated = some.trees(json.loads(data), 1500) + some.noise(data, 1500)
    worked = sum(attempts(lambda d=d: use_staircase(d)) for d in mutated)  # type: ignore[misc]
    assert 0 < worked < len(mutated), "some mutations do no harm, most do"


def test_mutated_manifests(some: Amount, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"engine")
    data = encode(manifest)
    use_manifest(data, tmp_path)
    mutated = some.trees(json.loads(data), 2000) + some.noise(data, 1500)
    worked = sum(attempts(lambda d=d: use_manifest(d, tmp_path)) for d in mutated)  # type: ignore[misc]
    assert 0 < worked < len(mutated)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutated_pages(some: Amount, manifest: Manifest, staircase: Staircase) -> None:
    """`report` on a bundle that somebody else made: whatever decodes is drawn, and as text."""
    ms, bad = Latency(samples_ms=(1.0, 2.0)), "<script>alert(1)</script>"
    patches = tuple(range(196))
    trace = BuildTrace(
        asked=bad,
        candidates=tuple(Candidate((197,) * 12, float(k), k / 10, 90.0, None) for k in range(1, 4)),
        trials=(Trial(tokens=(197,) * 12, predicted_ms=1.5, latency=ms),),
        samples=(Sample(picture=b"png", label=bad, unpruned=bad, pruned="b", groups=(patches, patches)),),
    )
    kinds = {"engine": Engine, "schedule": Schedule, "report": Report, "preprocessing": Preprocessing}
    whole: dict[str, Any] = {name: getattr(manifest, name) for name in kinds} | {
        "staircase": staircase,
        "trace": trace,
    }
    kinds |= {"staircase": Staircase, "trace": BuildTrace}

    def use(document: dict[str, Any]) -> None:
        records = {name: decode(json.dumps(document[name]).encode(), kind, name) for name, kind in kinds.items()}
        text = page_html(**records)
        assert "<script" not in text and "</html>" in text

    document = {name: json.loads(encode(record)) for name, record in whole.items()}
    assert attempts(lambda: use(document))
    worked = 0
    for name in kinds:
        for part in some.trees(document[name], 250):
            mutated = document | {name: json.loads(part)}
            worked += attempts(lambda m=mutated: use(m))  # type: ignore[misc]
    assert worked > 20


def test_mutated_devices_and_hosts(some: Amount, tmp_path: Path) -> None:
    def use(data: bytes) -> None:
        device = parse(data, "device.toml")
        if device.simulation is not None:
            vit = vit_of("vit_digits")
            assert (
                latency_ms(operations_of_ends(vit, 1), device, next(iter(device.simulation.fma_per_clock_per_sm))) > 0
            )

    worked = count = 0
    for name in devices.names():
        text = (Path(devices.__file__).parent / f"{name}.toml").read_bytes()
        assert attempts(lambda: use(text))  # noqa: B023
        for data in some.noise(text, 250):
            count += 1
            worked += attempts(lambda: use(data))  # noqa: B023
    hosts = b'[[to]]\nhost = "a@b"\ndir = "/opt"\n[[to]]\nhost = "c"\ndir = "x"\nprogram = "p"\n'
    for data in some.noise(hosts, 500):
        (tmp_path / "hosts.toml").write_bytes(data)
        attempts(lambda: fleet(tmp_path / "hosts.toml"))
    assert count >= 1000 * some.factor and 0 < worked < count


def test_mutated_csv(some: Amount, tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"x")
    (tmp_path.parent / "outside.png").write_bytes(b"x")
    text = b"image,label\n0.png,0\n1.png,1\n2.png,7\n"

    def use(data: bytes) -> None:
        (tmp_path / "labels.csv").write_bytes(data)
        found = load_images(tmp_path / "labels.csv")
        assert all(path.is_relative_to(tmp_path.resolve()) for path in found.paths)
        assert found.labels is None or len(found.labels) == len(found.paths)

    worked = sum(attempts(lambda d=d: use(d)) for d in some.noise(text, 2000))  # type: ignore[misc]
    assert worked > 20
    for row in (
        "../outside.png,0",
        "/etc/passwd,0",
        "0.png,-1",
        "0.png,99999999999",
        "0.png",
        ",",
        "\0,1",
    ):
        assert not attempts(lambda: use(f"image,label\n{row}\n".encode())), row  # noqa: B023


def test_mutated_arrays(some: Amount, tmp_path: Path) -> None:
    path = tmp_path / "golden.npy"
    np.save(path, np.arange(12, dtype=np.float32).reshape(3, 4))
    data = path.read_bytes()
    assert load_array(path).shape == (3, 4)
    for mutated in some.noise(data, 1500):
        path.write_bytes(mutated)
        attempts(lambda: load_array(path))
    for shape in ("(1000000000000,)", "(-1, -12)", "('a',)", "(3, 4), 'x': __import__('os')"):
        path.write_bytes(data.replace(b"(3, 4)", shape.encode().ljust(6)))
        assert not attempts(lambda: load_array(path)), shape
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert not attempts(lambda: load_array(path)), "pickles are never read"


def test_mutated_onnx(some: Amount, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "trunk",
        [value("x", TensorProto.FLOAT, [1, "tokens", 4])],
        [value("y", TensorProto.FLOAT, [1, "tokens", 4])],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    path = tmp_path / "trunk.onnx"

    def use(mutated: bytes) -> None:
        path.write_bytes(mutated)
        precision_of(load_onnx(path))
        fix_tokens(path, 5, tmp_path / "trunk-5.onnx")

    assert attempts(lambda: use(data))
    worked = sum(attempts(lambda d=d: use(d)) for d in some.noise(data, 1000))  # type: ignore[misc]
    assert 0 < worked < 1000 * some.factor
    attempts(lambda: described(path))


def test_mutated_pictures(some: Amount, tmp_path: Path) -> None:
    from PIL import Image

    how = Preprocessing(
        image_px=28, resize_px=28, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    for kind in ("png", "jpeg", "bmp", "tiff", "webp"):
        file = tmp_path / f"a.{kind}"
        Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)).save(file)
        data = file.read_bytes()
        for mutated in some.noise(data, 150):
            file.write_bytes(mutated)
            attempts(lambda: read_image(file, how))  # noqa: B023


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@QUICK
@given(JSON)
def test_any_json_is_decoded_or_refused(document: Any) -> None:
    data = json.dumps(document).encode()
    for kind in (Manifest, Staircase, Schedule, Report, Device, Preprocessing):
        attempts(lambda: decode(data, kind, "file"))  # noqa: B023


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    attempts(lambda: decode(data, Manifest, "file"))
    attempts(lambda: parse(data, "device.toml"))


@QUICK
@given(st.integers(1, 40), st.data())
def test_what_is_encoded_decodes_to_the_same(depth: int, data: st.DataObject) -> None:
    vit = msgspec.structs.replace(vit_of("vit_digits"), depth=depth)
    counts = data.draw(st.lists(st.integers(vit.prefix + 1, vit.tokens), min_size=depth, max_size=depth))
    schedule = Schedule(vit=vit, method="fold", policy="search", tokens=tuple(sorted(counts, reverse=True)))
    assert decode(encode(schedule), Schedule, "file") == schedule


def test_deep_nesting_is_refused() -> None:
    for data in (b"[" * 100_000, b'{"a":' * 100_000):
        assert not attempts(lambda: decode(data, Manifest, "file"))  # noqa: B023
        assert not attempts(lambda: parse(b"a = " + data, "device.toml"))  # noqa: B023
