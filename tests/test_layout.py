"""The shape of the code: dependencies point downward, heavy imports happen on use, files explain themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeprune

PACKAGE = Path(edgeprune.__file__).parent
CHECKOUT = PACKAGE.parent

# From the command line down to the errors. A module imports, anywhere in it, only from layers below its own.
LAYERS = (
    ("cli",),
    ("console", "report", "summary"),
    ("pipeline", "compare"),
    ("refine",),
    ("planning", "realise", "compiling", "bench", "doctor", "infer", "verify"),
    ("job", "html_report.page"),
    ("local", "ship", "triton"),
    ("profiling", "fidelity", "explain", "bundle", "html_report.files", "search", "zoo.train_digits"),
    ("target", "models", "schedule", "adaptive", "fusion", "baseline", "html_report.charts", "html_report.gallery"),
    ("export", "prune", "precision", "gemm", "staircase", "families.vit", "reducers.*"),
    ("reducers.common", "zoo", "families", "reducers", "html_report", "measure"),
    ("images", "tokens", "worker", "runtimes.ort", "runtimes.remote", "runtimes.simulated", "runtimes.trt"),
    ("runtimes.trt_builder", "runtimes.cuda_graph"),
    ("board", "graph", "passes", "products", "resources", "ssh", "wire"),
    ("devices", "runtimes"),
    ("records",),
    ("errors",),
    ("",),  # edgeprune itself: the version
)
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "onnxruntime",
    "tensorrt",
    "pycuda",
    "rich",
    "sklearn",
    "onnxscript",
}
# These run only where a model is built from timm; all others must import where torch is not installed.
BUILD_HALF = {"families.vit", "prune", "fidelity", "explain", "zoo.train_digits"}
LONG = {
    "cli": "one command after the other, each little more than its options",
    "records": "the schema, on one page: what any file of edgeprune holds",
}
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, COLUMNS = 280, 80, 118

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def layer_of(name: str) -> int:
    """Number of a module's layer, 0 being the top."""
    whole = [index for index, layer in enumerate(LAYERS) if name in layer]
    parts = [index for index, layer in enumerate(LAYERS) if f"{name.rpartition('.')[0]}.*" in layer]
    assert whole or parts, f"{name} has no layer yet: give it one in LAYERS"
    return (whole or parts)[0]


def imports(tree: ast.AST, lazy: bool = True) -> Iterator[tuple[str, int]]:
    """Modules that a tree imports, with the line; with `lazy` those inside functions and for types alone too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide what is meant"
            module = node.module or ""
            for alias in node.names:
                inside = f"{module}.{alias.name}".removeprefix("edgeprune.")
                yield (f"edgeprune.{inside}" if inside in FILES else module), node.lineno
        elif lazy or not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types(node)):
            yield from imports(node, lazy)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own(name: str) -> str | None:
    """Module inside the package; None for others."""
    return name.removeprefix("edgeprune").lstrip(".") if name.partition(".")[0] == "edgeprune" else None


def first_line(name: str) -> str:
    """First line of a module's docstring."""
    text = ast.get_docstring(TREES[name])
    assert text, f"{FILES[name].name} opens with no docstring"
    return text.splitlines()[0]


@pytest.mark.parametrize("name", FILES)
def test_dependencies_point_downward(name: str) -> None:
    here = layer_of(name)
    up = [
        f"line {line}: {target}"
        for target, line in imports(TREES[name])
        if (inside := own(target)) is not None and layer_of(inside) <= here
    ]
    assert not up, f"edgeprune.{name} imports from its own layer or above"


def test_every_layer_names_a_module() -> None:
    named = [entry for layer in LAYERS for entry in layer]
    assert len(named) == len(set(named))
    for entry in named:
        assert entry in FILES or any(
            name.startswith(entry.removesuffix("*")) for name in FILES if entry.endswith(".*")
        )


def test_imports_make_no_loop() -> None:
    """Of imports that run when a module is loaded, packages above a module included."""
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        found = {inside for target, _ in imports(tree, lazy=False) if (inside := own(target)) is not None}
        parents = {inside.rpartition(".")[0] for inside in found if "." in inside}
        graph[name] = {other for other in found | parents if other and other != name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_heavy_packages_are_imported_on_use(name: str) -> None:
    heavy = {target.partition(".")[0] for target, _ in imports(TREES[name], lazy=False)} & HEAVY
    if name not in BUILD_HALF and not name.startswith("reducers."):
        assert not heavy


def test_device_half_imports_without_torch() -> None:
    """What the rule above says of the text, tried: each module outside the build half, torch being blocked."""
    light = [f"edgeprune.{n}".rstrip(".") for n in FILES if n not in BUILD_HALF and not n.startswith("reducers.")]
    code = f"""
import importlib, importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
for name in {light!r}:
    importlib.import_module(name)
print(len({light!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(light) > 20


def test_adapters_are_named_as_strings() -> None:
    """A socket's table names its adapters without importing them; the names must lead somewhere."""
    from edgeprune.runtimes import RUNTIMES
    from edgeprune.vit.families import FAMILIES
    from edgeprune.vit.reducers import REDUCERS

    for socket, table in (("families", FAMILIES), ("reducers", REDUCERS), ("runtimes", RUNTIMES)):
        for entry in table.values():
            module, _, attribute = entry.partition(":")
            assert own(module) in FILES
            assert not attribute or re.search(
                rf"^(def|class) {attribute}\b", FILES[own(module) or ""].read_text(), re.M
            )
        assert not [target for target, _ in imports(TREES[socket]) if f"edgeprune.{socket}." in target]


def test_libraries_neither_print_nor_exit() -> None:
    for name, tree in TREES.items():
        if name in ("cli", "console", "zoo.train_digits"):
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [c for c in calls if isinstance(c, ast.Name) and c.id in ("print", "exit", "quit")], name
        assert not [
            c for c in calls if isinstance(c, ast.Attribute) and ast.unparse(c) in ("sys.exit", "os._exit")
        ], name


@pytest.mark.parametrize("name", FILES)
def test_file_opens_with_one_line_of_docstring(name: str) -> None:
    line = first_line(name)
    source = FILES[name].read_text().splitlines()[0]
    assert source.startswith('"""') and len(source) <= COLUMNS
    assert line.endswith(".")


@pytest.mark.parametrize("name", FILES)
def test_file_and_functions_are_short(name: str) -> None:
    lines = len(FILES[name].read_text().splitlines())
    assert lines < LINES_OF_A_FILE or name in LONG, f"{lines} lines"
    functions = (n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    long = [
        f"{f.name}: {f.end_lineno - f.lineno + 1}"
        for f in functions
        if f.end_lineno - f.lineno >= LINES_OF_A_FUNCTION
    ]
    assert not long


def test_long_files_are_really_long() -> None:
    """An exception that is no longer needed goes."""
    assert not [name for name in LONG if len(FILES[name].read_text().splitlines()) < LINES_OF_A_FILE]


@pytest.mark.parametrize(
    "name", [name for name in FILES if name and "." not in name and FILES[name].name != "__init__.py"]
)
def test_readme_tree_repeats_the_docstrings(name: str) -> None:
    wanted = first_line(name).removesuffix(".")
    lines = (CHECKOUT / "README.md").read_text().splitlines()
    found = [
        line.split(None, 1)[1] for line in lines if line.split()[:1] == [FILES[name].name] and " " in line.strip()
    ]
    assert found == [wanted]


def test_readme_tree_names_no_file_that_is_gone() -> None:
    text = (CHECKOUT / "README.md").read_text()
    block = next(part for part in text.split("```") if "errors.py" in part and "records.py" in part)
    named = {line.split()[0] for line in block.splitlines() if re.match(r"\s+\w+\.py\s", line)}
    assert named == {path.name for name, path in FILES.items() if name and path.parent == PACKAGE}
