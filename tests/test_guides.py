"""The diffs of docs/guides/ are as short as they claim, and their lines fit the library."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import l2l_prune

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
BLOCKS = [
    (path.stem, block)
    for path in sorted(GUIDES.glob("*.md"))
    for block in re.findall(r"```diff\n(.*?)```", path.read_text(), re.DOTALL)
]


def test_there_are_four():
    assert [name for name, _ in BLOCKS] == ["cavia", "cavia", "libfewshot", "metaoptnet"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_three_added_lines(number):
    lines = BLOCKS[number][1].splitlines()
    added = [line[1:].strip() for line in lines if re.match(r"\+(?!\+\+)", line)]
    assert len(added) == 3
    assert not [line for line in lines if re.match(r"-(?!--)", line)]
    imported, made, stepped = (ast.parse(line).body[0] for line in added)
    assert all(hasattr(l2l_prune, alias.name) for alias in imported.names)
    keywords = {keyword.arg for keyword in made.value.keywords}
    assert keywords <= set(inspect.signature(l2l_prune.Pruner).parameters)
    assert ast.unparse(stepped).removeprefix("self.") == "pruner.step()"
