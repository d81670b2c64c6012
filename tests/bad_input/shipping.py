"""Exports of what cannot be exported, and imports of what is none."""

from __future__ import annotations

import torch

from l2l_prune.shipping import export, load
from tests.bad_input.attaching import attached
from tests.bad_input.case import Case
from tests.conftest import SmallNet


def exported(folder):
    (folder / "done").mkdir()
    export(SmallNet(), folder / "done")
    return attached(folder)


def refused(name, words, error=ValueError, **options):
    return Case(
        f"export, {name}", lambda s: export(s.net, "out", **options), error, words, attached
    )


def unread(name, words, act, error=ValueError, ours=True):
    return Case(f"load, {name}", act, error, words, exported, ours)


CASES = [
    Case("export of a dict", lambda s: export({}, "out"), TypeError, "learner must be a torch"),
    Case("export of a class", lambda s: export(SmallNet, "out"), TypeError, "learner must be a"),
    refused("half a number", "half must be True or False", TypeError, half=1),
    refused("data a number", "data must be a string", TypeError, data=3),
    refused(
        "about a tensor",
        "about must hold only values",
        TypeError,
        about={"x": torch.ones(2)},
    ),
    refused("accuracy nan", "accuracy must be", accuracy=float("nan")),
    # Python's own error names the file.
    unread("no folder", "nowhere/export", lambda s: load("nowhere"), FileNotFoundError, False),
    unread("an empty folder", "export.json", lambda s: load("."), FileNotFoundError, False),
    unread(
        "a network that is not the library's",
        "which cannot be made from its export",
        lambda s: load("done"),
    ),
    unread("into a masked model", "model has masks", lambda s: load("done", s.net)),
    unread(
        "into a name",
        r"model must be a torch\.nn\.Module, got 'net'",
        lambda s: load("done", "net"),
        TypeError,
    ),
]
