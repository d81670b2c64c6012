"""MAML's meta-gradient in plain PyTorch: a loop over tasks, vmap over them, and that compiled.

The functions of ``examples/torch_func_maml.py``; ratios are to the loop over a dense model's tasks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.func import replace_all_batch_norm_modules_

from benchmarks.timing import interleaved, rows, show
from benchmarks.workload import SPARSE, device
from examples import torch_func_maml as example
from l2l_prune import Pruner
from l2l_prune.fewshot import Conv4

TASKS = 4


def looped(model: torch.nn.Module, params: Any, part: str, episodes: list[torch.Tensor]) -> Any:
    """One task after the other, gradients added up as autograd does it."""
    total: dict[str, torch.Tensor] = {}
    for number in range(TASKS):
        alone = [part[number : number + 1] for part in episodes]
        found, _ = example.meta_gradient(model, params, part, alone)
        total = {name: total.get(name, 0) + value / TASKS for name, value in found.items()}
    return total


def main(rounds: int) -> None:
    table = []
    for size, queries in ((28, 1), (28, 15)):
        dense = replace_all_batch_norm_modules_(Conv4(5, channels=32, image_size=size)).to(device())
        sparse = copy.deepcopy(dense)
        Pruner(sparse, SPARSE)
        x = [torch.randn(TASKS, 5 * n, 1, size, size).to(device()) for n in (1, queries)]
        y = [torch.arange(5).repeat(TASKS, n).to(device()) for n in (1, queries)]
        episodes = [x[0], y[0], x[1], y[1]]
        compiled = torch.compile(example.meta_gradient)
        variants: dict[str, Callable[[], object]] = {}
        for kind, model in (("dense", dense), ("50% masked", sparse)):
            params = dict(model.named_parameters())
            for name, step in (
                ("loop over tasks", looped),
                ("vmap", example.meta_gradient),
                ("vmap, compiled", compiled),
            ):
                variants[f"{name}, {kind}"] = functools.partial(step, model, params, "", episodes)
        times = interleaved(variants, rounds)
        table += rows(times, "loop over tasks, dense", f"{5 * queries}")
    show(
        f"MAML by torch.func, {TASKS} tasks of 5 classes and 1 shot at 28x28, 32 channels",
        ("queries", "variant", "seconds", "ratio", "middle half"),
        table,
    )
