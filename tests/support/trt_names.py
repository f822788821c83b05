"""Every TensorRT or pycuda name that our source uses, and the conditions it is used under, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

RUNTIMES = ROOT / "edgeprune/runtimes"
SOURCES = [RUNTIMES / f"{name}.py" for name in ("trt", "trt_session", "trt_builder", "trt_layers", "trt_log", "cuda")]

# What a TensorRT call returns, where it is another TensorRT object; "" for numbers, bytes and text. A call that
# is not listed fails the collection, so that no object escapes.
RETURNS = {
    "Builder.create_network": "INetworkDefinition",
    "Builder.create_builder_config": "IBuilderConfig",
    "Builder.build_serialized_network": "",
    "INetworkDefinition.get_layer": "ILayer",
    "ILayer.get_input": "ITensor",
    "ILayer.get_output": "ITensor",
    "ILayer.set_output_type": "",
    "IBuilderConfig.create_timing_cache": "ITimingCache",
    "IBuilderConfig.get_timing_cache": "ITimingCache",
    "IBuilderConfig.set_timing_cache": "",
    "IBuilderConfig.set_memory_pool_limit": "",
    "IBuilderConfig.set_flag": "",
    "IBuilderConfig.clear_flag": "",
    "IBuilderConfig.set_tactic_sources": "",
    "IBuilderConfig.set_preview_feature": "",
    "ITimingCache.serialize": "",
    "OnnxParser.parse_from_file": "",
    "OnnxParser.get_error": "ParserError",
    "ParserError.node": "",
    "ParserError.desc": "",
    "Runtime.deserialize_cuda_engine": "ICudaEngine",
    "ICudaEngine.create_execution_context": "IExecutionContext",
    "ICudaEngine.create_engine_inspector": "EngineInspector",
    "ICudaEngine.get_tensor_name": "",
    "ICudaEngine.get_tensor_mode": "TensorIOMode",
    "ICudaEngine.get_tensor_shape": "",
    "ICudaEngine.get_tensor_dtype": "DataType",
    "IExecutionContext.set_tensor_address": "",
    "IExecutionContext.execute_async_v3": "",
    "EngineInspector.get_engine_information": "",
}
# Parameters and attributes that hold a TensorRT object, by name: our source uses these names for nothing else.
HOLDS = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "layer": "ILayer",
    "end": "ITensor",
    "self._runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
}
Condition = tuple[str, bool]  # a dotted name below the module, and whether it is there


class Library(NamedTuple):
    """A module that is followed: the objects that its calls return and that names in our source hold."""

    returns: dict[str, str]
    holds: dict[str, str]


TENSORRT = Library(RETURNS, HOLDS)
# pycuda.driver; read in src/wrapper/wrap_cudadrv.cpp of pycuda 2022.2, the oldest that pyproject.toml takes.
PYCUDA = Library(
    returns={
        "init": "",
        "mem_get_info": "",
        "mem_alloc": "DeviceAllocation",
        "pagelocked_empty": "",
        "memcpy_htod_async": "",
        "memcpy_dtoh_async": "",
        "Device.compute_capability": "",
        "Device.get_attribute": "",
        "Device.name": "",
        "Device.total_memory": "",
        "Device.retain_primary_context": "Context",
        "Context.push": "",
        "Context.pop": "",
        "Stream.synchronize": "",
        "Event.record": "",
        "Event.synchronize": "",
        "Event.time_since": "",
        "DeviceAllocation.free": "",
    },
    holds={
        "cuda": "",
        "self._cuda": "",
        "driver()": "",
        "gpu()": "Device",
        "card": "Device",
        "memory": "DeviceAllocation",
        "primary": "Context",
        "self.primary": "Context",
    },
)


class Use(NamedTuple):
    """One name below the module, where it is used, and what holds there."""

    name: str
    place: str
    conditions: tuple[Condition, ...]


def uses(paths: Sequence[Path], library: Library = TENSORRT) -> list[Use]:
    """All uses in some source files. Raises ValueError for a call whose result is not in RETURNS."""
    trees = {path: ast.parse(path.read_text()) for path in paths}
    helpers: dict[str, tuple[Condition, ...]] = {}
    for tree in trees.values():
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            last = function.body[-1]
            if isinstance(last, ast.Return) and last.value is not None:
                found = Reader(Path("."), helpers, library).when(last.value, True)
                if found:
                    helpers[function.name] = found
    collected: list[Use] = []
    for path, tree in trees.items():
        reader = Reader(path, helpers, library)
        reader.body(tree.body, ())
        collected += reader.found
    return collected


class Reader:
    """Follows a library's objects through one file, statement by statement."""

    def __init__(self, path: Path, helpers: dict[str, tuple[Condition, ...]], library: Library) -> None:
        self.path, self.helpers, self.returns = path, helpers, library.returns
        self.names = dict(library.holds)
        self.found: list[Use] = []

    def body(self, statements: Sequence[ast.stmt], conditions: tuple[Condition, ...]) -> None:
        for statement in statements:
            self.statement(statement, conditions)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return | ast.Raise):
                conditions = (*conditions, *self.when(statement.test, False))

    def statement(self, node: ast.stmt, conditions: tuple[Condition, ...]) -> None:
        if isinstance(node, ast.If):
            self.expression(node.test, conditions)
            self.body(node.body, (*conditions, *self.when(node.test, True)))
            self.body(node.orelse, (*conditions, *self.when(node.test, False)))
            return
        if isinstance(node, ast.ClassDef):
            self.derived(node, conditions)
        if isinstance(node, ast.Assign):
            self.assigned(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.expression(child, conditions)
        for block in ("body", "orelse", "finalbody"):
            self.body(getattr(node, block, []), conditions)
        for handler in getattr(node, "handlers", []):
            if handler.type is not None:
                self.expression(handler.type, conditions)
            self.body(handler.body, conditions)

    def derived(self, node: ast.ClassDef, conditions: tuple[Condition, ...]) -> None:
        """A class below a TensorRT one: its public methods are TensorRT's to call."""
        for base in node.bases:
            if (held := self.holder(base)) is not None:
                self.use(held, node, conditions)
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        self.use(f"{held}.{method.name}", method, conditions)

    def assigned(self, node: ast.Assign) -> None:
        """Names that now hold a TensorRT object."""
        targets, values = [node.targets[0]], [node.value]
        if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            targets, values = targets[0].elts, node.value.elts
        for target, value in zip(targets, values, strict=True):
            held = self.result(value)
            of_another = isinstance(target, ast.Attribute) and self.holder(target.value) is not None
            if held is not None and not of_another:
                self.names[ast.unparse(target)] = held

    def expression(self, node: ast.AST, conditions: tuple[Condition, ...]) -> None:
        if isinstance(node, ast.IfExp):
            self.expression(node.test, conditions)
            self.expression(node.body, (*conditions, *self.when(node.test, True)))
            self.expression(node.orelse, (*conditions, *self.when(node.test, False)))
            return
        if isinstance(node, ast.Attribute) and (held := self.holder(node)) is not None:
            self.use(held, node, conditions)
        if isinstance(node, ast.Call):
            self.result(node)
        for child in ast.iter_child_nodes(node):
            self.expression(child, conditions)

    def holder(self, node: ast.AST) -> str | None:
        """The name below tensorrt that an expression is; None where it is none."""
        text = ast.unparse(node)
        if text in self.names:
            return self.names[text]
        if isinstance(node, ast.Attribute):
            if (outer := self.holder(node.value)) is not None:
                return f"{outer}.{node.attr}".lstrip(".")
        elif isinstance(node, ast.Call):
            return self.result(node)
        return None

    def result(self, node: ast.AST) -> str | None:
        """What a call returns, where it is a TensorRT object; an attribute of the module is itself."""
        if isinstance(node, ast.Call):
            called = self.holder(node.func)
            if called is None or called.startswith("_") or called == "":
                return None
            if "." not in called and called not in self.returns:  # a class: the object it makes
                return called
            if called.endswith(".__init__"):
                return None
            if called not in self.returns:
                raise ValueError(f"{self.path.name}, line {node.lineno}: add what {called}() returns to RETURNS")
            return self.returns[called] or None
        return self.holder(node) if isinstance(node, ast.Attribute) else None

    def when(self, test: ast.expr, holds: bool) -> tuple[Condition, ...]:
        """What a test says about TensorRT where it holds, or where it does not."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self.when(test.operand, not holds)
        if isinstance(test, ast.BoolOp):
            sure = isinstance(test.op, ast.And) == holds
            return tuple(c for value in test.values for c in self.when(value, holds)) if sure else ()
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name):
            if test.func.id == "hasattr" and isinstance(test.args[1], ast.Constant | ast.Name):
                held = self.holder(test.args[0])
                name = test.args[1].value if isinstance(test.args[1], ast.Constant) else None
                return ((f"{held}.{name}".lstrip("."), holds),) if held is not None and name else ()
            return self.helpers.get(test.func.id, ()) if holds else ()
        return ()

    def use(self, name: str, node: ast.AST, conditions: tuple[Condition, ...]) -> None:
        if name and not name.rpartition(".")[2].startswith("_"):
            self.found.append(Use(name, f"{self.path.name}:{getattr(node, 'lineno', 0)}", conditions))
