"""Runs of the command with ``device=``: every meta-learner, from its data to its weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from l2l_prune.experiments.algorithms import base
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.running import run as running
from tests.cuda.place import Place

SMALL = {
    "iterations": 4,
    "channels": 8,
    "train_classes": 10,
    "eval_every": 2,
    "curve_tasks": 2,
    "final_tasks": 2,
    "tasks": 2,
}
REPTILE = {
    "DSD": {},
    "channels": {"structured": True},
    "movement": {"criterion": "movement"},
    "GraSP": {"criterion": "grasp"},
    "rewinding": {"rewind": 1},
    "decay": {"weight_decay": 0.1},
    "RigL": {"method": "rigl"},
    "task masks": {"method": "task-masks"},
    "SNIP": {"criterion": "snip"},
    "MGAug": {"method": "dense", "mgaug": "width"},
    "DropGrad": {"method": "dense", "drop_grad": 0.1},
}


def config_on(device, algorithm="reptile", method="dsd", **settings):
    return make_config(algorithm, method, **{**SMALL, "device": device, **settings})


def flat(weights):
    """Without biases: those before a normalisation follow rounding alone."""
    return torch.cat([w.flatten() for w in weights.values() if w.dim() > 1])


def trained(config):
    (*_, result) = running.run(config)
    return flat(result.weights)


def compare(place: Place, **settings: Any) -> None:
    """What training changes is the same up to a tenth of its length: Adam magnifies rounding."""
    config = config_on("cpu", **settings)
    network = running._fresh(config, running.load_split(config, "train")).network
    start = flat(
        {name: value for name, value in network.state_dict().items() if "mask" not in name}
    )
    expected = trained(config)
    with place.fault():
        found = trained(config_on(place.device, **settings))
    assert (found - expected).norm() <= 0.1 * (expected - start).norm(), settings


def runs_of_reptile(place: Place) -> None:
    pytest.importorskip("torch_pruning")
    for settings in REPTILE.values():
        compare(place, **settings)


def runs_without_a_host(place: Place) -> None:
    for algorithm in ("cavia", "sparsemaml"):
        compare(place, algorithm=algorithm)


def runs_of_learn2learn(place: Place) -> None:
    pytest.importorskip("learn2learn")
    for algorithm in ("maml", "fomaml", "anil", "metasgd", "protonet"):
        compare(place, algorithm=algorithm)


def runs_of_metaoptnet(place: Place) -> None:
    pytest.importorskip("qpth")
    compare(place, algorithm="metaoptnet", backbone="conv4")


def runs_of_fields(place: Place) -> None:
    for backbone in ("siren", "fourier"):
        compare(place, algorithm="field", backbone=backbone, image_size=16)


def networks_and_images_are_there(place: Place) -> None:
    """Without this, a run that stays on the CPU would pass all other checks."""
    with place.fault():
        config = config_on(place.device)
        images = running.load_split(config, "train")
        network = base.conv4(config, images.images.shape[1:])
        held = [*images, *network.parameters()]
    assert {tensor.device.type for tensor in held} == {torch.device(place.device).type}


def runs_with_dropout(place: Place) -> None:
    """Torch's own generators are left as they were, and what they hold has no effect."""
    config, found = config_on(place.device, method="dense", dropout=0.3), []
    for seed in (7, 8):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with place.fault():
            found.append(trained(config))
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


def runs_resume(place: Place) -> None:
    """From a checkpoint."""
    config, path = config_on(place.device, method="dense", dropout=0.3), place.folder / "run.pt"
    straight = trained(config)
    with place.fault():
        list(itertools.islice(running.run(config, path, checkpoint_every=2), 2))
        (*_, resumed) = running.run(config, path)
    torch.testing.assert_close(flat(resumed.weights), straight, rtol=0, atol=1e-3)
