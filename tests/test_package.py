from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import l2l_prune

PACKAGE = Path(l2l_prune.__file__).parent
OPTIONAL = ("learn2learn", "higher", "lightning", "pytorch_lightning", "torch_pruning")
EXPERIMENTS = ("matplotlib", "rich", "typer", "PIL", "scipy", "tabulate")

# Arrows point down: a module may import only what stands before it.
FLOORS = [
    {"_values", "_files", "ranks"},
    {"_losses", "_tensor_files"},
    {"schedules"},
    {"masks", "criteria", "on_schedule"},
    {"patterns"},
    {"reparam", "selection", "optimizer_state"},
    {"pruner", "cavia"},
    {"channels"},
    {"structured"},
    {"inner_loop"},
    {"reptile", "theory"},
    {"integrations"},
    {"data", "batched"},
    {"evaluation"},
    {"experiments"},
    {"cli_options"},
    {"cli"},
    {"__main__"},
]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "l2l_prune":
            names |= {f"l2l_prune.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_public_names_and_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", l2l_prune.__version__)
    assert set(l2l_prune.__all__) <= set(dir(l2l_prune))
    assert (PACKAGE / "py.typed").exists()


def test_imports_point_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in imports_of(path):
            if name.startswith("l2l_prune.") and name.split(".")[1] in floor:
                below = name.split(".")[1]
                assert floor[below] < floor[parts[0]] or below == parts[0], (path, name)


@pytest.mark.parametrize("blocked", [OPTIONAL, OPTIONAL + EXPERIMENTS])
def test_import_and_use_without_optional_packages(blocked):
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import torch, l2l_prune
model = torch.nn.Linear(4, 2)
pruner = l2l_prune.Pruner(model, l2l_prune.DSDSchedule(0.5, pretrain=1, prune=1, retrain=1))
pruner.step()
assert (model.weight == 0).sum() == 4
pruner.finalize()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_loads_no_host():
    code = f"import l2l_prune, sys; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
