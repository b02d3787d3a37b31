from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import moa_ray.gating


def test_all_is_sorted_and_complete() -> None:
    public = {
        name for name, value in vars(moa_ray.gating).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(moa_ray.gating.__all__) == public
    assert len(moa_ray.gating.__all__) == len(public)


def test_the_room_imports_torch_and_the_errors_only() -> None:
    allowed = {"__future__", "torch", "abc", "collections", "dataclasses", "moa_ray.gating", "moa_ray.errors"}
    for file in Path(inspect.getfile(moa_ray.gating)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert any(name == a or name.startswith(a + ".") for a in allowed), (file.name, name)


def test_importing_moa_ray_does_not_import_torch() -> None:
    code = "import sys, moa_ray; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
