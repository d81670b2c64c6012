"""What each algorithm sets differently: for short runs on glyphs, and as it was published."""

from __future__ import annotations

from typing import Any

from l2l_prune.fewshot.evaluation import ACCURACY, PSNR, Measure

PICTURE_TASKS = ("field",)
"""Algorithms whose task is one picture: without ways and shots, and measured in PSNR."""

LEARN_MORE = ("metasgd", "sparsemaml")
"""Algorithms that learn more than the network's weights, while results hold only the weights."""


def measure_of(algorithm: str) -> Measure:
    """What an algorithm's scores are."""
    return PSNR if algorithm in PICTURE_TASKS else ACCURACY


_LEARN2LEARN: dict[str, Any] = {
    "train_shots": 1,
    "train_queries": 5,
    "layers": "all",
    "tasks": 4,
    "inner_steps": 1,
    "inner_lr": 0.5,
    "meta_lr": 3e-3,
    "eval_steps": 1,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "reptile": {},
    "maml": _LEARN2LEARN,
    "fomaml": _LEARN2LEARN,
    "anil": _LEARN2LEARN,
    "metasgd": _LEARN2LEARN,
    "sparsemaml": _LEARN2LEARN,
    "protonet": {**_LEARN2LEARN, "meta_lr": 1e-3},
    "cavia": {
        **_LEARN2LEARN,
        "channels": 128,
        "inner_steps": 2,
        "inner_lr": 1.0,
        "eval_steps": 2,
    },
    "metaoptnet": {
        **_LEARN2LEARN,
        "backbone": "resnet12",
        "train_shots": 2,
        "train_queries": 4,
        "tasks": 1,
        "meta_lr": 0.1,
        "curve_tasks": 4,
        "final_tasks": 100,
    },
    "field": {
        "backbone": "siren",
        "ways": 1,
        "queries": 0,
        "train_shots": 1,
        "train_classes": None,
        "layers": "all",
        "tasks": 3,
        "inner_steps": 2,
        "inner_lr": 0.01,
        "meta_lr": 1e-3,
        "eval_steps": 2,
        "final_tasks": 100,
    },
}
"""What each algorithm sets differently from
:class:`~l2l_prune.experiments.config.RunConfig`, for short runs on glyphs."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "reptile": {
        "iterations": 100_000,
        "train_shots": 15,
        "tasks": 5,
        "inner_steps": 8,
        "inner_batch": 10,
        "eval_steps": 50,
        "queries": 1,
        "final_tasks": 10_000,
    },
    "cavia": {
        "iterations": 60_000,
        "meta_lr": 1e-3,
        "train_queries": 15,
        "queries": 15,
        "tasks": 16,
        "final_tasks": 1_000,
    },
    "metaoptnet": {
        "iterations": 60_000,
        "train_shots": 15,
        "train_queries": 6,
        "queries": 15,
        "tasks": 8,
        "final_tasks": 1_000,
    },
    "field": {
        "iterations": 570_000,
        "channels": 256,
        "depth": 4,
        "omega": 200.0,
        "meta_lr": 1e-5,
    },
}
"""The published settings on mini-ImageNet, beside :data:`DEFAULTS`: the pruning paper's Section
5.1, and the defaults of the authors' scripts of CAVIA and MetaOptNet; for fields those of
Meta-SparseINR on CelebA, with as many iterations as its rounds take down to 5% of the weights."""

INSTANCES = {"glyphs": 20, "omniglot": 20}
"""Examples of a class, where MetaOptNet's published 15 shots and 6 queries do not fit."""
