"""Our TensorRT code against the real bindings of five versions, on a machine without TensorRT or a GPU.

The bindings import a dozen C functions; stand-in libraries with those names let them load. Needs gcc and the package
registry; skipped by name without.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT, TESTS
from support.trt_names import PYCUDA, RETURNS, SOURCES, uses

MODULE = "tensorrt_bindings"
BINDINGS = {  # version: distribution
    "8.6.1": "tensorrt_bindings",
    "10.3.0": "tensorrt_cu12_bindings",
    "10.13.3.9": "tensorrt_cu12_bindings",
    "10.16.1.11": "tensorrt_cu12_bindings",
    "11.4.0.106": "tensorrt_cu12_bindings",
}
SYMBOLS = {
    "libnvinfer": "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "getPluginRegistry getBuilderPluginRegistry",
    "libnvinfer_plugin": "initLibNvInferPlugins",
    "libnvonnxparser": "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion",
    "libnvparsers": "_ZN11nvuffparser15createUffParserEv _ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi "
    "_ZN14nvcaffeparser117createCaffeParserEv _ZN14nvcaffeparser123shutdownProtobufLibraryEv",
}


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Path:
    """Stand-in libraries per major version, and a place for bindings that outlives the run."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: no stand-in libraries for TensorRT's bindings")
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir("trt_api"))
    for major in sorted({version.partition(".")[0] for version in BINDINGS}):
        libraries = folder / f"lib{major}"
        libraries.mkdir(exist_ok=True)
        for library, symbols in SYMBOLS.items():
            name = f"{library}.so.{major}"
            if not (libraries / name).exists():
                source = "\n".join(f"void *{s}(void *a, void *b, int v) {{ return 0; }}" for s in symbols.split())
                command = ["gcc", "-xc", "-", "-shared", "-fPIC", "-o", name, f"-Wl,-soname,{name}"]
                subprocess.run(command, input=source, text=True, check=True, cwd=libraries)
    return folder


def binding(folder: Path, version: str) -> Path:
    """A folder with the real binding; skips where the registry cannot be reached or has none for this Python."""
    target = folder / f"{version}-py{sys.version_info[0]}{sys.version_info[1]}"
    if not target.exists():
        wanted = f"{BINDINGS[version]}=={version}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        partial = target.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        done = subprocess.run([*pip, "--target", str(partial), wanted], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{wanted} cannot be installed here: {done.stderr.strip().splitlines()[-1][:200]}")
        partial.rename(target)
    return target


def used_names() -> list[Any]:
    found = uses(SOURCES)
    return sorted({(use.name, use.place, use.conditions) for use in found})


@pytest.mark.parametrize("version", BINDINGS)
def test_every_name_exists(version: str, folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "uses.json"
    names.write_text(json.dumps(used_names()))
    environment = {
        "PATH": os.environ["PATH"],
        "LD_LIBRARY_PATH": str(folder / f"lib{version.partition('.')[0]}"),
        "PYTHONPATH": f"{binding(folder, version)}:{ROOT}",
    }
    command = [sys.executable, str(TESTS / "support/trt_check.py"), MODULE, str(names)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["missing"] == []
    assert found["version"].startswith(version.rpartition(".")[0])
    old = version.startswith("8.")
    assert found["strong"] is not old and found["monitor"] is not old and found["flags"] >= 1
    assert {"BOOL", "FLOAT", "HALF", "INT32"} <= set(found["types"])


def test_nothing_escapes_the_collection() -> None:
    """What the source plainly uses is found, with the conditions that it stands under."""
    found = uses(SOURCES)
    names = {use.name for use in found}
    assert {"Builder.build_serialized_network", "IExecutionContext.execute_async_v3", "TensorIOMode.INPUT"} <= names
    assert {"IBuilderConfig.profiling_verbosity", "IBuilderConfig.builder_optimization_level"} <= names
    assert set(RETURNS) <= names | {"Builder", "Runtime"}, "RETURNS tells of a call that is gone"
    [old] = [use for use in found if use.name == "ICudaEngine.device_memory_size"]
    assert old.conditions == (("ICudaEngine.device_memory_size_v2", False),)


def test_pycuda_is_used_as_it_was_read() -> None:
    """pycuda has no wheels to check against: a new use must be looked up in its source; tests/gpu asks a real one."""
    names = {use.name for use in uses(SOURCES, PYCUDA)}
    others = {"Context", "Device", "Error", "Event", "Stream", "Stream.handle", "device_attribute"}
    others |= {f"device_attribute.{name}" for name in ("INTEGRATED", "MULTIPROCESSOR_COUNT")}
    assert names == {*PYCUDA.returns, *others}


@pytest.mark.parametrize(
    ("source", "name", "conditions"),
    [
        ("config.set_calibrator(1)", None, None),  # not in RETURNS: what it returns must be listed
        ("builder.create_network(0).add_input", "INetworkDefinition.add_input", ()),
        ("x = trt.Runtime(logger)\nx.thing", "Runtime.thing", ()),
        ("flags = trt.Flags\nif hasattr(flags, 'A'):\n    flags.A", "Flags.A", (("Flags.A", True),)),
        ("def f(trt):\n    if not hasattr(trt, 'B'):\n        return None\n    trt.B", "B", (("B", True),)),
        ("engine.a if hasattr(engine, 'b') else engine.c", "ICudaEngine.c", (("ICudaEngine.b", False),)),
        ("config.thing = trt.Verbosity.HIGH", "IBuilderConfig.thing", ()),
    ],
)
def test_reader(source: str, name: str | None, conditions: Any, tmp_path: Path) -> None:
    path = tmp_path / "source.py"
    path.write_text(source)
    if name is None:
        with pytest.raises(
            ValueError, match=r"line 1: add what IBuilderConfig\.set_calibrator\(\) returns to RETURNS"
        ):
            uses([path])
        return
    found = {use.name: use.conditions for use in uses([path])}
    assert found[name] == conditions
