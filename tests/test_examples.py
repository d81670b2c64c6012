"""Every example runs, and without its marked lines it is learn2learn's own, dense loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("learn2learn")

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
MARK = "# l2l_prune"


def run(folder, *paths):
    """All in one process, since importing the hosts takes most of the time."""
    code = "import runpy, sys\nsys.argv = ['example', '12']\n"
    code += "\n".join(f"runpy.run_path({str(path)!r}, run_name='__main__')" for path in paths)
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_all_are_here():
    names = {path.stem for path in EXAMPLES}
    assert names == {
        "maml",
        "fomaml",
        "metasgd",
        "anil",
        "metacurvature",
        "protonet",
        "reptile",
        "higher_maml",
        "lightning_maml",
        "cavia",
        "cavia_sine",
        "metaoptnet",
        "fields",
        "torch_func_maml",
        "torchopt_maml",
        "easyfsl_protonet",
        "timm_vit",
    }


QUICK = ("maml",)
HOSTS = {"torchopt_maml": "torchopt", "easyfsl_protonet": "easyfsl", "timm_vit": "timm"}


@pytest.mark.process
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow, id=p.stem)
        for p in EXAMPLES
    ],
)
def test_example(path, tmp_path):
    pytest.importorskip(HOSTS.get(path.stem, "torch"))
    lines = path.read_text().splitlines()
    plain = [line for line in lines if MARK not in line]
    assert 2 <= len(lines) - len(plain) <= 5
    code = "\n".join(plain)
    assert not any(word in code for word in ("Pruner", "Pruning", "Schedule", "prune("))
    dense = tmp_path / "dense.py"
    dense.write_text(code)
    run(tmp_path, path, dense)
