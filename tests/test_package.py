from __future__ import annotations

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import l2l_prune

PACKAGE = Path(l2l_prune.__file__).parent
OPTIONAL = ("learn2learn", "higher", "lightning", "pytorch_lightning", "torch_pruning")
EXPERIMENTS = ("matplotlib", "rich", "typer", "PIL", "scipy", "tabulate")


def test_public_names_and_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", l2l_prune.__version__)
    assert set(l2l_prune.__all__) <= set(dir(l2l_prune))
    assert len(l2l_prune.__all__) <= 25  # few enough to know them all
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.process
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


@pytest.mark.process
def test_importing_loads_no_host():
    code = f"import l2l_prune, sys; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.process
def test_the_long_description_links_to_nothing_in_the_checkout(tmp_path):
    """As an index shows it: read from what is built."""
    pytest.importorskip("build")
    pytest.importorskip("hatch_fancy_pypi_readme")
    command = ["build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(PACKAGE.parent)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True).decode()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets), targets
    readme = (PACKAGE.parent / "README.md").read_text()
    assert "whole channels" in text  # the words of a link stay
    code = re.findall(r"```.*?```", readme, re.DOTALL)
    assert code
    assert all(block in text for block in code)
