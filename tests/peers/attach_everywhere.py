"""Pytest plugin: every model that a host's own tests hand to it has a Pruner attached first.

At sparsity 0 masks are all ones, so the host's tests must come out as without the plugin.
"""

from __future__ import annotations

import functools

import torch

from l2l_prune import Pruner, Schedule, Segment
from l2l_prune.masking.masked_layer import held_names

SCHEDULE = Schedule((Segment(10**6, sparse=True, sparsity=0.0),))
attached = 0


def attach(model: object) -> None:
    """Attach once, where there is anything to prune."""
    global attached
    if not isinstance(model, torch.nn.Module):
        return
    if any(held_names(module) for module in model.modules()):
        return
    try:
        Pruner(model, SCHEDULE)
    except ValueError:  # nothing prunable, tied, a clone: as a user would be told
        return
    attached += 1


def first_argument(function):
    """Wrap so that the first module among the arguments is attached before the call."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.nn.Module) and value is not (args[0] if args else None):
                attach(value)
                break
        else:
            attach(args[0] if args else None)
        return function(*args, **kwargs)

    return wrapped


def pytest_configure(config):
    try:
        import learn2learn as l2l

        for algorithm in (l2l.algorithms.MAML, l2l.algorithms.MetaSGD, l2l.algorithms.GBML):
            algorithm.__init__ = first_argument(algorithm.__init__)
    except ImportError:
        pass
    try:
        import higher

        higher.patch.make_functional = first_argument(higher.patch.make_functional)
    except ImportError:
        pass


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"l2l_prune was attached to {attached} models")
