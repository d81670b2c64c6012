"""The version matrix: ``nox`` runs all of it, ``nox -s "core(python='3.13', ...)"`` one cell.

Results on the founders' machine: docs/versions.md. The hosts' tests need learn2learn, whose qpth
pins numpy < 2 and whose C code needs a build option: ``make test`` runs them, in one version.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False

# Python, torch, numpy: the oldest and the newest torch, both numpys, every Python that has wheels.
MATRIX = [
    ("3.10", "2.4.0", "1.26.4"),
    ("3.10", "2.4.0", "2.2.6"),
    ("3.10", "2.14.1", "2.2.6"),
    ("3.11", "2.14.1", "1.26.4"),
    ("3.12", "2.4.0", "2.5.5"),
    ("3.12", "2.14.1", "1.26.4"),
    ("3.13", "2.6.0", "2.5.5"),
    ("3.13", "2.14.1", "2.5.5"),
]
# What takes minutes, or needs no second version, stays with ``make test``.
LEFT_OUT = {"docs", "examples", "guides", "package", "stateful"}
PATHS = [
    *(str(path) for path in sorted(Path("l2l_prune").glob("*.py")) if path.stem != "__main__"),
    *(
        str(path)
        for path in sorted(Path("tests").glob("test_*.py"))
        if path.stem.removeprefix("test_") not in LEFT_OUT
    ),
    "tests/bad_input",
    "tests/experiments/test_config.py",
    "tests/fewshot/data/test_episodes.py",
    *(f"tests/{folder}" for folder in ("channels", "masking", "methods", "reptile", "schedules")),
]


@nox.session
@nox.parametrize(("python", "torch", "numpy"), MATRIX)
def core(session: nox.Session, torch: str, numpy: str) -> None:
    """Core, command and bad input; warnings in l2l_prune are errors (see pyproject.toml)."""
    extras = ".[experiments,structured,higher,lightning,tensorboard,cluster]"
    tools = ("pytest>=8", "hypothesis>=6.100", "onnxruntime>=1.18")
    session.install(f"torch=={torch}", f"numpy=={numpy}", "-e", extras, *tools)
    session.run("python", "-c", "import sys, torch, numpy; print(sys.version, torch.__version__)")
    session.run(
        "pytest",
        "-q",
        *(session.posargs or PATHS),
        env={"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )


@nox.session(python=["3.11", "3.13"])
def wheel(session: nox.Session) -> None:
    """The wheel alone in a clean environment: it imports, prunes, and shows its types."""
    dist = Path(session.create_tmp())
    session.install("build", "mypy>=1.13", "pyright")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist), ".")
    session.install("--force-reinstall", *(str(path) for path in dist.glob("*.whl")))
    consumer = dist / "consumer.py"
    consumer.write_text(CONSUMER)
    session.chdir(dist)  # so that the checkout is not what is imported
    session.run("python", "consumer.py")
    session.run("mypy", "--strict", "consumer.py")
    session.run("pyright", "consumer.py")


CONSUMER = """
import torch
from l2l_prune import DSDSchedule, Pruner

model = torch.nn.Linear(4, 2)
pruner = Pruner(model, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1))
pruner.step()
sparsity: float = pruner.sparsity
masks: dict[str, torch.Tensor] = pruner.masks
assert sparsity == 0.5 and int(masks["weight"].sum()) == 4
assert int((model.weight == 0).sum()) == 4
"""
