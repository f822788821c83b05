"""What imports cost: `import edgeprune` loads nothing heavy, and outside edgeprune.vit no module needs torch.

Who may import whom is for import-linter and ruff to check (pyproject.toml, `make lint`).
"""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import edgeprune

BLOCKED = (
    "torch",
    "torchvision",
    "timm",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "pycuda",
    "rich",
    "ray",
    "pyarrow",
)
BLOCK = f"""
import importlib.abc, importlib, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_edgeprune_loads_nothing_heavy() -> None:
    loaded = json.loads(python("import edgeprune, json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert "edgeprune" in loaded
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & {*BLOCKED, "numpy", "onnx", "msgspec", "typer", "PIL", "jinja2"}
    assert [name for name in loaded if name.startswith("edgeprune.")] == ["edgeprune.version"]


def test_modules_outside_vit_import_without_torch() -> None:
    names = [module.name for module in pkgutil.walk_packages(edgeprune.__path__, "edgeprune.")]
    light = [name for name in names if not name.startswith("edgeprune.vit.") and name != "edgeprune.__main__"]
    assert len(light) > 60
    python(f"{BLOCK}\nfor name in {light!r}:\n    importlib.import_module(name)")
