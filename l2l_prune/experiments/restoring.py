"""The network, or the meta-learner around it, that a finished run ended with."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
from torch import nn

from l2l_prune.channels.pruner import ChannelPruner
from l2l_prune.experiments.algorithms import build
from l2l_prune.experiments.report.finished_runs import FinishedRun, read_weights
from l2l_prune.fewshot.data import Images
from l2l_prune.reptile.learner import adam
from l2l_prune.reptile.reptile import PrunedReptile
from l2l_prune.schedules.schedule import Schedule, Segment


def restored_network(run: FinishedRun, data: Images) -> nn.Module:
    """The network of a finished run with its weights, in the mode in which the run was scored.

    It is small if the run ended with channels cut out.

    Raises:
        FileNotFoundError: If the file of its weights is gone.
        ValueError: If that file is damaged, or of another network.
    """
    config, shape = run.settings_on_cpu(), data.images.shape[1:]
    state = read_weights(run.weights_file.path)
    with torch.random.fork_rng(devices=[]):
        dense = config.rebuilt(Schedule((Segment(1),)), structured=False)
        algorithm = build(dense, shape)
        net = algorithm.finalize().train(algorithm.scored_in_training)
    sizes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    if sizes != {name: tensor.shape for name, tensor in state.items()}:
        raise ValueError(f"{run.weights_file.path} holds the weights of another network")
    net.load_state_dict(state)
    last = config.schedule.last
    if not config.structured or not last.held:
        return net
    # Of the channels that the run had cut out all weights are 0, so that none is worth less.
    whole, again = copy.deepcopy(net), Schedule((dataclasses.replace(last, iterations=1),))
    pruner = ChannelPruner(net, again, example_inputs=torch.zeros(2, *shape))
    small = pruner.export().module
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    if not torch.allclose(small(x), whole(x), rtol=1e-3, atol=1e-4):
        raise ValueError(f"the channels that {run.folder} had cut out cannot be told from the rest")
    return small


def restored_reptile(run: FinishedRun, data: Images) -> PrunedReptile:
    """A meta-learner around a finished run's network, as it was in the run's last phase.

    Raises:
        FileNotFoundError: As for :func:`restored_network`.
        ValueError: Likewise.
    """
    config = run.settings_on_cpu()
    net = restored_network(run, data)
    segment = Segment(1)
    if run.segments[-1]["sparse"] and not config.structured:
        weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
        left = {name: int(p.count_nonzero()) for name, p in weights.items()}
        keep = {name: count for name, count in left.items() if 0 < count < weights[name].numel()}
        segment = Segment(1, sparse=True, keep=keep) if keep else segment
    return PrunedReptile(
        net,
        Schedule((segment,)),
        inner_lr=config.inner_lr,
        inner_optimizer=functools.partial(adam, weight_decay=config.weight_decay),
    )
