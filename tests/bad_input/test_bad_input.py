"""What a user may do wrong: each is refused by name, and leaves everything as it was."""

from __future__ import annotations

import re
import traceback
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import l2l_prune
from l2l_prune import DSDSchedule, IHTSchedule, PrunedReptile
from l2l_prune.experiments.cli import app
from tests.bad_input import (
    attaching,
    commands,
    data,
    hosts,
    numbers,
    reptile,
    rivals,
    saved,
    settings,
    shipping,
)
from tests.bad_input.case import Case, snapshot
from tests.conftest import SmallNet

SURFACES = (
    numbers, attaching, saved, reptile, rivals, hosts, data, settings, shipping, commands
)  # fmt: skip
CASES: dict[str, Case] = {
    f"{surface.__name__.rpartition('.')[2]}: {case.name}": case
    for surface in SURFACES
    for case in surface.CASES
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_misuse_is_named_and_changes_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = case.scene(tmp_path)
    before = snapshot(scene, tmp_path)

    with pytest.raises(Exception) as raised:  # noqa: PT011 - the type and the words come next
        case.act(SimpleNamespace(**scene))

    told = "".join(traceback.format_exception(raised.value))
    assert type(raised.value) is case.error, told
    message = str(raised.value)
    assert re.search(case.words, message, re.DOTALL), f"{message!r} lacks {case.words!r}"
    assert " at 0x" not in message, f"an address tells a person nothing: {message!r}"
    assert len(message) < 1500, message
    if case.ours:
        package = str(Path(l2l_prune.__file__).parent)
        assert raised.traceback[-1].path.as_posix().startswith(package), told
    assert snapshot(scene, tmp_path) == before


def test_the_table_is_long_and_has_no_name_twice():
    assert len(CASES) == sum(len(surface.CASES) for surface in SURFACES) >= 80


def test_what_is_right_in_another_type_is_taken():
    plain = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1, keep={"fc": 3})
    number, whole = np.float32(0.5), np.int64
    counts = {"pretrain": whole(1), "prune": torch.tensor(2), "retrain": whole(1)}
    assert DSDSchedule(number, **counts, keep={"fc": whole(3)}) == plain
    assert DSDSchedule(Fraction(1, 2), pretrain=1, prune=2, retrain=1, keep=(("fc", 3),)) == plain
    assert type(DSDSchedule(number, **counts).sparsity) is float
    assert IHTSchedule.from_fractions(number, whole(100)) == IHTSchedule.from_fractions(0.5, 100)
    net = SmallNet()
    reptile = PrunedReptile(
        net, plain, inner_lr=np.float32(0.5), meta_lr=np.float64(1), skip=nn.Conv2d
    )
    assert list(reptile.pruner.masks) == ["fc.weight"]


def test_one_schedule_in_a_config_file_needs_no_list(tmp_path):
    (tmp_path / "run.toml").write_text('schedule = "iht"\niterations = 100\n')
    line = ["run", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    with (
        mock.patch("l2l_prune.experiments.running.compare_one_seed.compare_one_seed") as started,
        mock.patch("l2l_prune.experiments.cli.check_files"),
    ):
        result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    (config,) = started.call_args.args[0]
    assert config.schedule == IHTSchedule.from_fractions(0.5, 100)
