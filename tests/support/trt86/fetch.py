"""Fetches TensorRT 8.6.0's ONNX parser into a folder: 2.9 MB out of a wheel of 819 MB on PyPI. Once; needs gcc.

python -m support.trt86.fetch FOLDER
The library is NVIDIA's, under the licence next to it: keep it out of commits, images and releases.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARSER = "libnvonnxparser.so.8"
SHA256 = "b6a2091ebe8e3f5ddf6d4652522807017fc9925d2cd4cbcd05b1db6de0ff552d"
LICENCE = "tensorrt-8.6.0.dist-info/LICENSE.txt"
DOWNLOAD = "download -q --no-deps --only-binary=:all: --python-version 3.10 --platform manylinux_2_17_x86_64"
# What the parser links to besides libstdc++: two functions, and a plugin registry whose functions all answer zero.
STAND_INS = """
#include <stdbool.h>
#include <stddef.h>
static void *nothing(void) { return NULL; }
#define FOUR nothing, nothing, nothing, nothing
static void *(*const functions[16])(void) = {FOUR, FOUR, FOUR, FOUR};
static void *registry = (void *)functions;
void *getPluginRegistry(void) { return &registry; }
bool initLibNvInferPlugins(void *logger, char const *space) { (void)logger; (void)space; return true; }
"""


def fetch(folder: Path) -> None:
    """Write the parser, its licence and two stand-in libraries; a folder that has the parser is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    parser = folder / PARSER
    if not parser.exists() or hashlib.sha256(parser.read_bytes()).hexdigest() != SHA256:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            pip = [sys.executable, "-m", "pip", *DOWNLOAD.split(), "-d", place, "tensorrt==8.6.0"]
            subprocess.run(pip, check=True)
            with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
                content, licence = wheel.read(f"tensorrt/{PARSER}"), wheel.read(LICENCE)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise SystemExit(f"{PARSER} of the wheel is not the one these tests were written for: check SHA256")
        parser.write_bytes(content)
        (folder / "LICENSE.txt").write_bytes(licence)
    for name in ("libnvinfer.so.8", "libnvinfer_plugin.so.8"):
        gcc = ["gcc", "-xc", "-", "-shared", "-fPIC", "-O2", "-s", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(gcc, input=STAND_INS, text=True, check=True)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
