"""The parser on that network. Run as `python -m support.trt86.parser FOLDER MODEL.onnx` it prints one JSON object.

FOLDER is what fetch.py made. A process for each file: the parser may crash on what the network does not know.
"""

from __future__ import annotations

import ctypes as C
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.paths import TESTS
from support.trt86.abi import DTYPES, ELEMENTWISE, KEPT, NOTHING, REDUCE, UNARY, StandInError, cpp_object
from support.trt86.network import Layer, Network

LOG = C.CFUNCTYPE(None, C.c_void_p, C.c_int32, C.c_char_p)
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
PARSE_FILE, COUNT, GET = 1, 6, 7  # virtual functions of nvonnxparser::IParser
OPERATIONS = {"ElementWise": ELEMENTWISE, "Unary": UNARY, "Reduce": REDUCE}


class Parser:
    """nvonnxparser::IParser of libnvonnxparser.so.8 on a network of ours. One for each file."""

    def __init__(self, folder: Path) -> None:
        for name in ("libnvinfer.so.8", "libnvinfer_plugin.so.8"):  # stand-ins of a few lines, see fetch.py
            C.CDLL(str(folder / name), C.RTLD_GLOBAL)
        library = C.CDLL(str(folder / "libnvonnxparser.so.8"))
        library.createNvOnnxParser_INTERNAL.restype = C.c_void_p
        library.createNvOnnxParser_INTERNAL.argtypes = [C.c_void_p, C.c_void_p, C.c_int]
        self.log: list[tuple[str, str]] = []
        self.network = Network()
        entry = LOG(lambda this, level, text: self.log.append((SEVERITIES[level], text.decode(errors="replace"))))
        table = (C.c_void_p * 3)(*(C.cast(each, C.c_void_p) for each in (entry, NOTHING, NOTHING)))
        KEPT.append((entry, table))
        logger, version = cpp_object(C.addressof(table)), library.getNvOnnxParserVersion()
        self.address = library.createNvOnnxParser_INTERNAL(self.network.address, logger, version)
        if not self.address:
            raise StandInError(f"createNvOnnxParser_INTERNAL gave nothing: {self.log}")

    def _virtual(self, index: int, returned: Any, *kinds: Any, this: int | None = None) -> Any:
        this = this or self.address
        table = C.c_void_p.from_address(this).value
        function = C.CFUNCTYPE(returned, C.c_void_p, *kinds)(C.c_void_p.from_address(table + 8 * index).value)
        return lambda *args: function(this, *args)

    def parse(self, path: Path) -> bool:
        return bool(self._virtual(PARSE_FILE, C.c_bool, C.c_char_p, C.c_int)(str(path).encode(), 4))

    def errors(self) -> list[str]:
        found = []
        for i in range(self._virtual(COUNT, C.c_int)()):
            error = self._virtual(GET, C.c_void_p, C.c_int)(i)
            text = [self._virtual(n, C.c_char_p, this=error)() or b"" for n in (1, 2, 4)]
            line, node = (self._virtual(n, C.c_int, this=error)() for n in (3, 5))
            found.append(
                f"node {node}: {text[0].decode()} [{os.path.basename(text[1].decode())}:{line} {text[2].decode()}]"
            )
        return found


def judge(folder: Path, path: Path) -> dict[str, Any]:
    """What the parser says of one file, and the network it asked for."""
    parser = Parser(folder)
    network = parser.network
    parsed = parser.parse(path)
    rows = []
    for layer in network.layers:
        try:
            made = zip(layer.made, layer.outputs(), strict=True)
            outputs = [[tensor.name, list(dims), DTYPES[dtype]] for tensor, (dims, dtype) in made]
            inputs = [DTYPES[tensor.dtype] for tensor in layer.inputs if tensor is not None]
        except Exception as error:  # of the stand-in, whatever it is: no verdict
            network.failures.append(str(error))
            continue
        row = {"name": layer.name, "type": layer.kind, "detail": detail(layer), "inputs": inputs, "outputs": outputs}
        rows.append(row)
    return {
        "parsed": parsed,
        "errors": parser.errors(),
        "warnings": list(dict.fromkeys(text for severity, text in parser.log if severity in SEVERITIES[:3])),
        "complaints": network.complaints,
        "no_verdict": list(dict.fromkeys(network.failures)),
        "layers": rows,
        "outputs": [[t.name, list(t.dims), DTYPES[t.dtype]] for t in network.outputs] if parsed else [],
    }


def judge_apart(folder: Path, path: Path) -> dict[str, Any]:
    """judge in a process of its own."""
    command = [sys.executable, "-m", "support.trt86.parser", str(folder), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    return {"no_verdict": [f"ended with {done.returncode}: {done.stderr.strip()[-500:]}"]}


def detail(layer: Layer) -> str:
    """The settings of a layer that matter to a reader."""
    s = layer.settings
    if layer.kind in OPERATIONS:
        return str(OPERATIONS[layer.kind][s["Operation"]])
    if layer.kind == "Cast":
        return f"to {DTYPES[s['ToType']]}"
    if layer.kind == "Normalization":
        return f"computes in {DTYPES[s.get('ComputePrecision', 0)]}"
    return f"K={s['K']}" if layer.kind == "TopK" else ""


if __name__ == "__main__":
    json.dump(judge(*map(Path, sys.argv[1:])), sys.stdout)
