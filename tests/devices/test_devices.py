"""Devices: every bundled file, a user's own file, and what this machine is."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune import devices
from edgeprune.errors import DeviceError, RecordError
from edgeprune.runtimes.target import FP8_CAPABILITY

BUNDLED = ("agx-orin", "cpu", "cuda", "h100", "jetson-thor", "jetson-tx2", "orin-nano", "orin-nx")
MINE = """
name = "mine"
title = "My board"
runtime = "trt"
sm_count = 4
machine = ["My Board"]
[simulation]
clock_mhz = 1000
bandwidth_gb_per_s = 50
launch_us = 5
fma_per_clock_per_sm = {fp16 = 1024}
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PC with a CPU called Example CPU and no NVIDIA GPU; returns where a board's name would stand."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Example CPU\nflags\t: fpu\n")
    monkeypatch.setattr(devices, "DEVICE_TREE", tmp_path / "model")
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "NVIDIA_SMI", str(tmp_path / "nvidia-smi"))
    monkeypatch.setattr(devices, "LIBCUDA", str(tmp_path / "libcuda.so.1"))
    return tmp_path / "model"


def has_gpu(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let Python stand in for nvidia-smi."""
    monkeypatch.setattr(devices, "NVIDIA_SMI", shlex.join([sys.executable, "-c", code]))


def test_names_are_the_bundled_files() -> None:
    assert devices.names() == BUNDLED


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_device_loads_under_its_own_name(name: str) -> None:
    device = devices.load_device(name)
    assert device.name == name
    assert device.title
    if name in ("cpu", "cuda"):
        assert device.simulation is None and not device.machine
    else:
        assert device.simulation is not None and device.machine
        assert device.power_query == (None if name == "h100" else "nvpmodel -q")
        assert {"fp32", "fp16", "int8"} == set(device.simulation.fma_per_clock_per_sm) - {"tf32", "fp8"}
        has_fp8 = tuple(map(int, str(device.compute_capability).split("."))) >= FP8_CAPABILITY
        assert ("fp8" in device.simulation.fma_per_clock_per_sm) is has_fp8


@pytest.mark.parametrize(
    ("name", "cores", "dense_tops"),
    [
        ("orin-nano", 1024, 67 / 2),
        ("orin-nx", 1024, 60 / 2 * 1173 / 918),
        ("agx-orin", 2048, 170 / 2),
        ("jetson-thor", 2560, 1035 / 2),
        ("jetson-tx2", 256, None),
        ("h100", 16896, 1979),
    ],
)
def test_figures_give_the_published_peaks(name: str, cores: int, dense_tops: float | None) -> None:
    device = devices.load_device(name)
    assert device.simulation is not None and device.sm_count is not None
    rates = device.simulation.fma_per_clock_per_sm
    assert device.sm_count * rates["fp32"] == cores
    if dense_tops is not None:
        assert rates["fp16"] * 2 == rates["int8"]
        tops = 2 * rates["int8"] * device.sm_count * device.simulation.clock_mhz * 1e6 / 1e12
        assert tops == pytest.approx(dense_tops, rel=0.01)


def test_unknown_device_lists_the_known() -> None:
    with pytest.raises(DeviceError, match=r"unknown device 'orin'.*agx-orin, cpu, cuda"):
        devices.load_device("orin")
    with pytest.raises(DeviceError, match="unknown device"):
        devices.load_device("../devices/cpu")


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    device = devices.load_device(str(path))
    assert (device.name, device.sm_count) == ("mine", 4)
    assert device.simulation is not None and device.simulation.launch_us == 5


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("sm_count = 4", 'sm_count = "four"', r"\$\.sm_count"),
        ("sm_count = 4", "cores = 4", "cores"),
        ("sm_count = 4", "", r"\$\.sm_count: a simulation"),
        ("sm_count = 4", "sm_count = 0", r"\$\.sm_count is not above 0"),
        ('title = "My board"', "", "title"),
        ('"mine"', '"../mine"', r"\$\.name"),
        ("clock_mhz = 1000", "clock_mhz = nan", r"\$\.simulation\.clock_mhz is not above 0"),
        ("fp16 = 1024", "fp16 = -1", r"\$\.simulation\.fma_per_clock_per_sm\.fp16"),
        ("{fp16 = 1024}", "{}", r"\$\.simulation\.fma_per_clock_per_sm: name at least one precision"),
        ("launch_us = 5", "launch_us = 0", r"\$\.simulation\.launch_us is not above 0"),
        ("launch_us = 5", "launch_us = 5\ntile = [64, 64]", "tile"),
        ("sm_count = 4", 'sm_count = 4\ncompute_capability = "ampere"', r"\$\.compute_capability"),
        ("sm_count = 4", 'sm_count = 4\npower_query = "nvpmodel -q \'"', r"\$\.power_query: No closing quotation"),
        ("sm_count = 4", "sm_count = ", "line 5"),
        ("sm_count = 4", "sm_count = " + "9" * 5000, "not a valid device file"),
        ("sm_count = 4", "sm_count = 0x" + "f" * 5000, "not a valid device file"),
        ("sm_count = 4", "x = " + "[" * 5000, "not a valid device file"),
    ],
)
def test_malformed_file_names_the_field(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "mine.toml"
    assert old in MINE
    path.write_text(MINE.replace(old, new))
    with pytest.raises(RecordError, match=f"mine.toml: .*{named}") as caught:
        devices.load_device(str(path))
    assert "\n" not in str(caught.value)


def test_file_that_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(RecordError, match="cannot be read"):
        devices.load_device(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not a valid device file"):
        devices.load_device(str(path))
    path.write_bytes(b"#" * (devices.MAX_TOML_BYTES + 1))
    with pytest.raises(RecordError, match="more than"):
        devices.load_device(str(path))


def test_this_machine_is_the_board_if_it_has_a_name(machine: Path) -> None:
    machine.write_bytes(b"NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0")
    assert devices.this_machine() == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"


def test_this_machine_is_cpu_and_gpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.this_machine() == "Example CPU"
    has_gpu(monkeypatch, "print('Example GPU\\nSecond GPU')")
    assert devices.this_machine() == "Example CPU, Example GPU"
    has_gpu(monkeypatch, "print('driver mismatch'); raise SystemExit(9)")
    assert devices.this_machine() == "Example CPU"


def test_device_elsewhere_is_refused_with_the_name_of_this_machine(machine: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        devices.check_is_here(devices.load_device("orin-nano"))
    assert str(caught.value) == (
        "device orin-nano is not this machine (this is Example CPU): run there, name it with --host USER@HOST, or "
        "plan with --simulate"
    )
    machine.write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    with pytest.raises(DeviceError, match="this is NVIDIA Jetson AGX Orin Developer Kit"):
        devices.check_is_here(devices.load_device("orin-nano"))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("orin-nano", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"),
        ("orin-nx", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"),
        ("agx-orin", "NVIDIA Jetson AGX Orin Developer Kit"),
        ("jetson-thor", "NVIDIA Jetson AGX Thor Developer Kit"),
        ("h100", "Example CPU, NVIDIA H100 80GB HBM3"),
    ],
)
def test_a_board_is_one_device_only(machine: Path, name: str, model: str) -> None:
    machine.write_bytes(model.encode() + b"\0")
    boards = [devices.load_device(n) for n in BUNDLED if n not in ("cpu", "cuda")]
    fits = []
    for device in boards:
        try:
            devices.check_is_here(device)
        except DeviceError:
            continue
        fits.append(device.name)
    assert fits == [name]


def test_tx2_is_refused_with_its_reason_even_on_a_tx2(machine: Path) -> None:
    machine.write_bytes(b"NVIDIA Jetson TX2 Developer Kit\0")
    with pytest.raises(DeviceError, match=r"TensorRT 8\.2 is too old.*plan with --simulate"):
        devices.check_is_here(devices.load_device("jetson-tx2"))


def test_cuda_needs_a_gpu_that_answers_and_cpu_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.check_is_here(devices.load_device("cpu"))
    cuda = devices.load_device("cuda")
    with pytest.raises(DeviceError, match=r"this is Example CPU; .*nvidia-smi finds no NVIDIA GPU") as caught:
        devices.check_is_here(cuda)
    assert "--simulate" not in str(caught.value)
    has_gpu(monkeypatch, "print('Example GPU')")
    devices.check_is_here(cuda)


def test_the_gpu_that_is_asked_is_the_one_that_runs(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host with several GPUs nvidia-smi lists all, and CUDA uses the first of CUDA_VISIBLE_DEVICES."""
    has_gpu(monkeypatch, "import sys; print('GPU', sys.argv[sys.argv.index('-i') + 1])")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.nvidia_gpu() == "GPU 0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234,0")
    assert devices.nvidia_gpu() == "GPU GPU-1234"


@pytest.mark.parametrize(("gpu", "name", "here"), [("Orin", "orin-nano", True), ("Orin", "jetson-thor", False)])
def test_a_board_whose_name_docker_hides_is_known_by_its_gpu(
    gpu: str, name: str, here: bool, machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """/proc/device-tree/model is masked in a container, where nvidia-smi is missing as well."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(devices, "_name_from_driver", lambda: gpu)
    device = devices.load_device(name)
    if here:
        devices.check_is_here(device)
        assert "--security-opt systempaths=unconfined" in caplog.text
    else:
        with pytest.raises(
            DeviceError, match=r"\(in a container: docker run --security-opt systempaths=unconfined\)"
        ):
            devices.check_is_here(device)


def test_the_name_of_a_gpu_from_the_driver_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A libcuda of three functions, built here."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: no libcuda can be built")
    source = (
        "int cuInit(unsigned f) { return f; } int cuDeviceGet(int *d, int n) { *d = n; return 0; }\n"
        'int cuDeviceGetName(char *s, int n, int d) { const char *t = "Orin"; while ((*s++ = *t++)); return d; }'
    )
    command = ["gcc", "-xc", "-", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(command, input=source, text=True, check=True)
    monkeypatch.setattr(devices, "NVIDIA_SMI", str(tmp_path / "nvidia-smi"))
    monkeypatch.setattr(devices, "LIBCUDA", str(tmp_path / "libcuda.so.1"))
    assert devices.nvidia_gpu() == "Orin"
    monkeypatch.setattr(devices, "LIBCUDA", str(tmp_path / "none.so"))
    assert devices.nvidia_gpu() is None


@pytest.mark.parametrize("name", ["orin-nano", "orin-nx", "agx-orin"])
def test_orin_takes_what_jetpack_6_and_7_bring(name: str) -> None:
    """JetPack 7.2 brings TensorRT 10.16 to Orin, and TensorRT 11 can be installed there."""
    device = devices.load_device(name)
    assert device.tensorrt == ">=8.6,<12" and device.gpu == "Orin"
