"""The wheel: what it carries, and that the device half of it runs in a bare environment of each Python."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from edgeprune import __version__, zoo

PYTHONS = ("3.10", "3.13")  # the oldest and the newest that pyproject.toml promises
PARTS = ("edgeprune", "calib", "pyproject.toml", "README.md", "LICENSE")
NO_NETWORK = (
    "NewConnectionError",
    "Retrying (",
    "ConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "name resolution",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this checkout."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    copy = tmp_path_factory.mktemp("copy")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, copy)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def interpreters(version: str) -> Iterator[Path]:
    """Where a Python of this version may be: on the path, or among pyenv's, whose shims need not work."""
    name = f"python{version}"
    if found := shutil.which(name):
        yield Path(found)
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == version:
        yield Path(sys.executable)
    if shutil.which("pyenv"):
        done = subprocess.run(["pyenv", "prefix", version], capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            yield Path(done.stdout.strip()) / "bin" / name
    for root in (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv"):
        if root:
            yield from sorted(Path(root).glob(f"versions/{version}*/bin/{name}"))


def python_of(version: str) -> Path | None:
    """An interpreter that really runs and is of this version."""
    for path in interpreters(version):
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.startswith(f"Python {version}."):
            return path
    return None


@pytest.fixture(scope="module", params=PYTHONS)
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `edgeprune` program of the wheel, installed without extras into a fresh environment."""
    version: str = request.param
    python = python_of(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    folder = tmp_path_factory.mktemp(f"python{version}")
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True, timeout=300, env=plain())
    for installer in installers(folder / "bin" / "python"):
        done = subprocess.run([*installer, wheel], capture_output=True, text=True, timeout=600, env=plain())
        if done.returncode == 0:
            break
    if done.returncode != 0 and any(sign in done.stdout + done.stderr for sign in NO_NETWORK):
        pytest.skip(f"no package registry to install for Python {version} from")
    assert done.returncode == 0, done.stderr
    return folder / "bin" / "edgeprune"


def installers(python: Path) -> Iterator[list[str | Path]]:
    """Commands that install into the environment of an interpreter: uv where it is, like the Makefile, then pip."""
    uv = Path(sys.executable).parent / "uv"
    if uv.exists():
        yield [uv, "pip", "install", "--quiet", "--python", python]
    yield [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]


def plain() -> dict[str, str]:
    """The environment without what would lead a fresh Python to this checkout or this virtual environment."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def run(program: Path, cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """A command of the installed program."""
    return subprocess.run([program, *argv], capture_output=True, text=True, timeout=300, cwd=cwd, env=plain())


def test_the_tested_set_can_be_installed() -> None:
    """Every extra that make installs, with constraints.txt, for each Python: resolved, not installed.

    From wheels alone: with source archives a pin that an old Python lacks ends in the oldest release of a package.
    """
    if importlib.util.find_spec("uv") is None:
        pytest.skip("uv is not installed")
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--only-binary", ":all:"]
    command += ["--no-python-downloads", "--constraint", "constraints.txt", "--extra", "export", "--extra", "ort"]
    command += ["pyproject.toml", "requirements-dev.txt", "--python-version"]

    def resolved(version: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, version], capture_output=True, text=True, timeout=300, cwd=ROOT)

    with ThreadPoolExecutor() as side_by_side:
        for done in side_by_side.map(resolved, ("3.10", "3.11", "3.12", "3.13")):
            if done.returncode and any(sign in done.stderr for sign in (*NO_NETWORK, "Failed to fetch", "dns error")):
                pytest.skip("no package index can be reached")
            assert done.returncode == 0, done.stderr
            assert "import-linter==2." in done.stdout, "an old release of a package that pins do not reach"


def test_wheel_carries_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        table = archive.read("edgeprune/zoo/digits/labels.csv").decode()
        weights = archive.read("edgeprune/zoo/vit_digits.safetensors")
        metadata = archive.read(f"edgeprune-{__version__}.dist-info/METADATA").decode()
    source = ROOT / "edgeprune"
    wanted = {
        f"edgeprune/{p.relative_to(source)}"
        for p in source.rglob("*")
        if p.suffix in (".py", ".toml", ".json", ".css", ".j2")
    }
    assert wanted <= names
    assert {f"edgeprune/devices/{name}.toml" for name in ("cpu", "cuda", "orin-nano", "jetson-tx2")} <= names
    assert hashlib.sha256(weights).hexdigest() == hashlib.sha256(zoo.WEIGHTS.read_bytes()).hexdigest()
    rows = list(csv.DictReader(io.StringIO(table)))
    assert len(rows) > 100
    assert all(f"edgeprune/zoo/digits/{row['image']}" in names for row in rows)
    assert f"Version: {__version__}" in metadata and "Requires-Python: >=3.10" in metadata


def test_wheel_carries_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        sizes = sum(entry.compress_size for entry in archive.infolist())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"edgeprune", f"edgeprune-{__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".tmp", ".onnx"))]
    assert sizes < 8 << 20


def test_sdist_has_what_the_tests_read() -> None:
    """Every top-level name that a test takes from the root, and those that tests import."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    read = set(re.findall(r'ROOT / "([\w.-]+)', text)) | {"benchmarks", "constraints.txt"}
    assert read - {"pyproject.toml"} <= set(listed)  # hatchling always adds pyproject.toml


def test_bare_install_has_no_heavy_package(installed: Path) -> None:
    python = installed.parent / "python"
    heavy = ("torch", "timm", "onnxruntime")
    code = f"import importlib.util as u; print([name for name in {heavy} if u.find_spec(name)])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, env=plain())
    assert done.stdout == "[]\n", "what follows would prove nothing"


def test_bare_install_lists_devices(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "devices", "--json")
    assert done.returncode == 0, done.stderr
    assert "orin-nano" in [row["name"] for row in json.loads(done.stdout)["devices"]]


def test_bare_install_has_a_doctor(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["edgeprune"]["status"] == "ok" and __version__ in checks["edgeprune"]["detail"]
    assert ".[export]" in checks["torch"]["detail"]


def test_bare_install_plans_for_a_jetson(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "profile", "--simulate", "--device", "orin-nano", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["simulated"] is True and row["treads"][-1] == 197
    assert (tmp_path / row["path"]).is_file()


def test_bare_install_says_what_a_build_needs(installed: Path, tmp_path: Path) -> None:
    for device in ("cpu", "orin-nano"):
        simulate = ("--simulate",) if device == "orin-nano" else ()
        done = run(installed, tmp_path, "build", "--device", device, *simulate)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1 and 'pip install ".[' in done.stderr
        assert "in the checkout" in done.stderr
