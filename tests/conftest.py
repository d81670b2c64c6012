from __future__ import annotations

import contextlib
import os
import shutil

import hypothesis
import pytest
import torch
from torch import nn

from l2l_prune.fewshot.data import glyphs

OLD_TORCH = not hasattr(torch.compiler, "set_stance")  # before 2.6: no compiled steps
needs_compiler = pytest.mark.skipif(
    OLD_TORCH or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="compiled steps need torch 2.6 and a C++ compiler",
)

hypothesis.settings.register_profile("nightly", max_examples=5000, deadline=None, print_blob=True)


class SmallNet(nn.Module):
    """Two convolutions, batch normalisation and a classifier, in an order that can be mixed up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, bias=False)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).flatten(1))


@contextlib.contextmanager
def without_compiler():
    """The same code run by Python, for cases that differ in logic and not in kernels."""
    if OLD_TORCH:
        pytest.skip("compiled steps need torch 2.6")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session", autouse=True)
def glyph_cache(tmp_path_factory):
    """One rendering for all tests and the commands that they start, apart from the user's own.

    Each process of tests unpacks its file once, as long as the file stays the same.
    """
    read, known = glyphs._read, {}

    def read_once(path, *more):
        if not path.exists():
            return read(path, *more)
        key = (path, path.stat().st_mtime_ns, path.stat().st_size, str(more))
        if key not in known:
            known[key] = read(path, *more)
        return known[key] or read(path, *more)  # which warns again

    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()  # of one pytest-xdist worker: its parent is of all
        base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
        patch.setenv("L2L_PRUNE_CACHE", str(base / "glyphs"))
        patch.setattr(glyphs, "_read", read_once)
        yield base / "glyphs"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def net():
    return SmallNet()


@pytest.fixture
def batch():
    return torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
