"""Fixtures of all tests: the real assets, tiny random models of every kind, hand-made records, one measured build."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import exports
from support.builds import ONE_THREAD, Shallow, copied, shallow_model, shared_build
from support.loopback import server
from support.models import EVA_KINDS, KINDS, shake
from support.paths import TESTS
from support.processes import measure_few
from support.records import NOISELESS, SETUP

from edgeprune.records import Latency, Point, Staircase, Vit

assert "torch" not in sys.modules, "OpenMP reads the environment when torch is imported"
os.environ.update(ONE_THREAD)
# pytest gives its handler to loggers that do not propagate, and torch describes every step of an export to a handler.
setattr(logging.getLogger("torch.__trace"), "addHandler", lambda handler: None)  # noqa: B010 a method

# The files that take longest, in this order, begin first, so that two test processes end at about the same time. The
# first makes the shared build, the second does not need it.
LONGEST = (
    "pipeline/test_build.py",
    "distributed/test_ray.py",
    "test_docs.py",
    "aarch64/test_aarch64.py",
    "deploy/test_ansible.py",
    "bundles/test_ship.py",
    "pipeline/test_dense.py",
    "trt_judge/test_rtx.py",
    "test_gpu_run.py",
    "runtimes/test_remote.py",
    "test_api.py",
    "vit/test_export.py",
    "test_workflows.py",
    "pipeline/test_embed.py",
    "pipeline/test_recover.py",
    "cli/test_cli.py",
    "vit/test_eva.py",
    "pipeline/test_resume.py",
    "test_packaging.py",
    "pipeline/test_compile.py",
    "bundles/test_canary.py",
    "onnx_graph/test_int8.py",
    "benchmark/test_bench.py",
    "cli/test_errors.py",
    "pipeline/test_auto.py",
    "pipeline/test_simulated_builds.py",
    "pipeline/test_onnx_files.py",
    "runtimes/test_trt.py",
    "pipeline/test_wide_pictures.py",
    "benchmark/test_baseline.py",
    "onnx_graph/test_fp16.py",
    "test_hostile.py",
)


@pytest.fixture(scope="session", autouse=True)
def _few_rounds() -> None:
    """Staircases are measured in a third of the rounds that users get, as in the processes that tests fork."""
    measure_few()


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Locks of timings lie there: test processes need not take turns, with each other or with what else runs here."""
    folder, before = str(tmp_path_factory.mktemp("tmp")), tempfile.gettempdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", before)  # of its sockets: their paths have to be short
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _shared_exports(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)
    os.environ[exports.FOLDER] = str(folder)
    exports.share()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; xdist hands them out as they come (--no-loadscope-reorder)."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the real ViT-Tiny weights and images."""
    folder = os.environ.get("EDGEPRUNE_ASSETS")
    if not folder:
        pytest.skip("EDGEPRUNE_ASSETS is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """tiny(kind, depth=3) is a Model of KINDS or EVA_KINDS: 16 px, patch 4, width 48, 3 heads, 7 classes."""
    import timm.layers
    import timm.models.deit
    import timm.models.eva
    import timm.models.vision_transformer as vits
    import torch

    from edgeprune.records import Preprocessing
    from edgeprune.vit.families import family_of
    from edgeprune.vit.models import Model

    @cache
    def make(kind: str, depth: int = 3) -> Model:
        torch.manual_seed(0)
        options = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": depth, "num_heads": 3, "num_classes": 7}
        options |= EVA_KINDS[kind] if kind in EVA_KINDS else KINDS[kind]
        gated = options.pop("gated", False)
        if "block" in options:
            options["block_fn"] = getattr(vits, options.pop("block"))
        if "mlp" in options:
            options["mlp_layer"] = getattr(timm.layers, options.pop("mlp"))
        build: Any = timm.models.deit.VisionTransformerDistilled if kind == "distilled" else vits.VisionTransformer
        if kind in EVA_KINDS:
            build = timm.models.eva.Eva
        module = build(**options)
        for block in module.blocks if gated else ():
            block.attn.gate = torch.nn.Linear(48, 48)
        shake(module)
        _, family = family_of(module)
        how = Preprocessing(
            image_px=16, resize_px=16, interpolation="bicubic", crop_mode="center", mean=(0.5,) * 3, std=(0.5,) * 3
        )
        return Model(module, family, family.describe(module, kind, "0" * 64), how)

    return make


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The one measured build of all tests, made by the first process that needs it."""
    base = tmp_path_factory.getbasetemp()
    return copied(shared_build(base.parent), base) if "PYTEST_XDIST_WORKER" in os.environ else shared_build(base)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Shallow:
    """A model of three blocks for tests that need a build but not its depth, made by the first process that asks."""
    base = tmp_path_factory.getbasetemp()
    return shallow_model(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A machine on loopback that answers ssh."""
    with server(tmp_path_factory.mktemp("sshd")) as made:
        yield made


@pytest.fixture
def ssh(there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own ssh configuration, which knows that machine."""
    monkeypatch.setenv("EDGEPRUNE_SSH", there.ssh)


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., Vit]:
    """make_vit(**fields) is a Vit record: 12 blocks, 197 tokens, prefix 1, unless given otherwise."""

    def make(**fields: Any) -> Vit:
        defaults: dict[str, Any] = {"name": "test", "weights_sha256": "0" * 64, "family": "vit", "image_px": 224}
        defaults |= {"patch_px": 16, "depth": 12, "width": 192, "heads": 3, "head_dim": 64, "mlp_width": 768}
        defaults |= {"prefix": 1, "tokens": 197, "classes": 1000, "prefix_pooled": True}
        return Vit(**defaults | fields)

    return make


@pytest.fixture(scope="session")
def make_staircase(make_vit: Callable[..., Vit]) -> Callable[..., Staircase]:
    """make_staircase({tokens: ms or samples}, fixed=, dense=, **fields) is a Staircase.

    The unpruned model takes the fixed part and the trunk together unless `dense` is given.
    """

    def make(
        points: Mapping[int, float | Sequence[float]], fixed: float = 1.0, dense: float | None = None, **fields: Any
    ) -> Staircase:
        def latency(ms: float | Sequence[float]) -> Latency:
            return Latency(samples_ms=(ms,) if isinstance(ms, int | float) else tuple(ms))

        counts = sorted(points)
        whole = fixed + latency(points[counts[-1]]).median_ms if dense is None else dense
        return Staircase(
            vit=fields.pop("vit", None) or make_vit(tokens=counts[-1]),
            setup=SETUP if any(len(latency(ms).samples_ms) > 1 for ms in points.values()) else NOISELESS,
            fixed=latency(fixed),
            dense=latency(whole),
            points=tuple(Point(tokens=n, latency=latency(points[n])) for n in counts),
            **fields,
        )

    return make
