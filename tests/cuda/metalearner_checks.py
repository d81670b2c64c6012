"""The library's own meta-learners: CAVIA, MetaOptNet's episodes, neural fields."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune.metalearners.cavia import CAVIA, FiLM
from l2l_prune.metalearners.fields import FieldMAML, Siren, coordinates
from l2l_prune.metalearners.metaoptnet import MetaOptNet
from tests.cuda.hosts_checks import PER_TASK, after_adapting, train
from tests.cuda.place import SCHEDULE, WIDE, Place, batch


def with_cavia(place: Place) -> None:
    def run(device, schedule):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), FiLM(3, 4), nn.LeakyReLU(), nn.Flatten(), nn.Linear(64, 3)]
        net = nn.Sequential(*layers).to(device, WIDE)
        host = CAVIA(net, lr=0.5).to(device)
        return train(device, net, host, after_adapting(host, device), schedule)

    for schedule in (SCHEDULE, PER_TASK):
        place.compare(functools.partial(run, schedule=schedule))


def with_metaoptnet(place: Place) -> None:
    """Not quite as close: the solver of the support vector machine stops early."""
    pytest.importorskip("qpth")

    def run(device, head):
        torch.manual_seed(0)
        features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(64, 8))
        net = features.to(device, WIDE)
        host = MetaOptNet(net, head).to(device, WIDE)

        def task_loss(number):
            x, _ = batch(number, device)
            y = torch.arange(3, device=device).repeat(2)
            return F.cross_entropy(host(x[:6], y, x[6:]), y[:2])

        return train(device, net, host, task_loss)

    for head, close in (("ridge", {}), ("svm", {"atol": 1e-4})):
        place.compare(functools.partial(run, head=head), **close)


def with_fields(place: Place) -> None:
    def run(device):
        net = Siren(width=8, generator=torch.Generator().manual_seed(0)).to(device, WIDE)
        host = FieldMAML(net, lr=0.01).to(device)
        x = coordinates(6, 6).to(device, WIDE)

        def task_loss(number):
            generator = torch.Generator().manual_seed(number)
            y = torch.rand(2, 36, 1, generator=generator, dtype=WIDE).to(device)
            return host.loss(x, y)

        return train(device, net, host, task_loss)

    place.compare(run)
