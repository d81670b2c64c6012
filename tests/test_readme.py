"""Every Python block of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, tmp_path, monkeypatch):
    if "learn2learn" in BLOCKS[number]:
        pytest.importorskip("learn2learn")
    if "structured" in BLOCKS[number]:
        pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) == 3
