"""The loop shapes of the public CAVIA and MetaOptNet scripts, with the lines of docs/guides/.

None of their code is here: the loops keep what matters to pruning, as docs/guides/ describes it.
Each runs once with the plugin and once against an oracle that masks a dense model by hand.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, IHTSchedule, Pruner, dense_state_dict
from l2l_prune.schedules.paper import Schedule, Segment

from .oracle import largest

SCHEDULES = [
    DSDSchedule(0.4, pretrain=3, prune=4, retrain=3),
    IHTSchedule(0.4, pretrain=2, prune=3, retrain=1, rounds=2),
    Schedule((Segment(3), Segment(5, sparse=True, sparsity=0.4))),  # ends pruned
]


class ContextAttribute(nn.Module):
    """A network whose context is a plain attribute, set to a new tensor at each inner step."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
        self.film1 = nn.Linear(5, 8)
        self.fc1 = nn.Linear(4 * 16, 3)
        self.double()
        self.reset_context_params()

    def reset_context_params(self):
        self.context_params = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def forward(self, x):
        gamma, beta = self.film1(self.context_params).view(2, 1, 4, 1, 1)
        return self.fc1(F.relu(gamma * self.bn1(self.conv1(x)) + beta).flatten(1))


def episode(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.arange(12) % 3
    return x[:6], y[:6], x[6:] + 0.1 * y[6:].view(-1, 1, 1, 1), y[6:]


def cavia_meta_gradient(model, iteration, tasks=2):
    """Summed by index over ``model.parameters()``, averaged, clamped."""
    total = [0 for _ in range(len(model.state_dict()))]
    for task in range(tasks):
        xs, ys, xq, yq = episode(100 * iteration + task)
        model.reset_context_params()
        for _ in range(2):
            loss = F.cross_entropy(model(xs), ys)
            gradient = torch.autograd.grad(loss, model.context_params, create_graph=True)[0]
            model.context_params = model.context_params - 1.0 * gradient
        gradients = torch.autograd.grad(F.cross_entropy(model(xq), yq), model.parameters())
        for index, gradient in enumerate(gradients):
            total[index] += gradient.detach()
    model.reset_context_params()
    return [(g / tasks).clamp(-10, 10) for g in total[: len(gradients)]]


class HandMasked:
    """A dense model pruned by hand around its optimizer: sort, zero, hold, clear momentum."""

    def __init__(self, model, names, schedule, optimizer, key):
        self.weights = {n: model.get_parameter(n) for n in names}
        self.schedule, self.optimizer, self.key = schedule, optimizer, key
        self.iteration, self.masks = 0, {}
        self.hold()

    def hold(self):
        with torch.no_grad():
            for name, mask in self.masks.items():
                weight = self.weights[name]
                weight.mul_(mask)
                state = self.optimizer.state[weight]
                if self.key in state:
                    state[self.key].mul_(mask)

    def step(self):
        self.hold()
        last = self.schedule.iterations - 1
        before, self.iteration = min(self.iteration, last), self.iteration + 1
        segment = self.schedule.segment(min(self.iteration, last))
        if segment is not self.schedule.segment(before):
            chosen = self.weights if segment.sparse else {}
            self.masks = {n: largest(w.detach(), segment.sparsity) for n, w in chosen.items()}
            self.hold()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["dsd", "iht", "ends pruned"])
def test_cavia_loop(schedule):
    torch.manual_seed(1)
    model = ContextAttribute()
    twin = copy.deepcopy(model)
    meta_optimiser = torch.optim.Adam(model.parameters(), 0.01)
    pruner = Pruner(model, schedule, meta_optimiser, dense_keys=True, release_state="keep")
    twin_optimiser = torch.optim.Adam(twin.parameters(), 0.01)
    names = [n for n, p in twin.named_parameters() if p.dim() > 1]
    by_hand = HandMasked(twin, names, schedule, twin_optimiser, "exp_avg")
    assert set(pruner.masks) == {"conv1.weight", "film1.weight", "fc1.weight"}
    for iteration in range(schedule.iterations):
        for net, optimizer, end in (
            (model, meta_optimiser, pruner),
            (twin, twin_optimiser, by_hand),
        ):
            gradients = cavia_meta_gradient(net, iteration)
            optimizer.zero_grad()
            for param, gradient in zip(net.parameters(), gradients, strict=True):
                param.grad = gradient
            if net is twin:  # its gradients do not know the masks
                for name, mask in by_hand.masks.items():
                    by_hand.weights[name].grad *= mask
            optimizer.step()
            end.step()
        assert_same(model, twin)
        best = copy.deepcopy(model)  # the regression script keeps such copies
        assert torch.equal(best(episode(0)[0]), model(episode(0)[0]))
        plain = ContextAttribute()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(episode(0)[0]), model(episode(0)[0]))


def assert_same(model, twin):
    for (name, a), b in zip(
        dense_state_dict(model).items(), twin.state_dict().values(), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-10, rtol=0), name


def embedding():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Flatten(),
    ).double()


class ScaledRidge(nn.Module):
    """A head with a learned scale, its only parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, query, support, labels):
        kernel = support @ support.t() + 50 * torch.eye(len(support), dtype=torch.float64)
        target = 2 * F.one_hot(labels).double()
        return self.scale * (query @ support.t() @ torch.linalg.solve(kernel, target))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["dsd", "iht", "ends pruned"])
def test_metaoptnet_loop(schedule, tmp_path):
    """DataParallel around the embedding, nesterov SGD with weight decay over two groups, dense
    checkpoints after every epoch that a test program loads into plain modules."""
    torch.manual_seed(1)
    nets, ends = [], []
    for pruned in (True, False):
        torch.manual_seed(1)
        net, head = nn.DataParallel(embedding()), ScaledRidge()
        optimizer = torch.optim.SGD(
            [{"params": net.parameters()}, {"params": head.parameters()}],
            lr=0.1,
            momentum=0.9,
            weight_decay=5e-4,
            nesterov=True,
        )
        nets.append((net, head, optimizer))
        if pruned:
            ends.append(Pruner(net, schedule, optimizer, dense_keys=True))
        else:
            names = [n for n, p in net.named_parameters() if p.dim() > 1]
            ends.append(HandMasked(net, names, schedule, optimizer, "momentum_buffer"))
    for iteration in range(schedule.iterations):
        xs, ys, xq, yq = episode(iteration)
        for (net, head, optimizer), end in zip(nets, ends, strict=True):
            net.train(), head.train()
            logits = head(net(xq), net(xs), ys)
            loss = F.cross_entropy(logits, yq)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            end.step()
        assert_same(nets[0][0], nets[1][0])
        net, head, _ = nets[0]
        torch.save(
            {"embedding": net.state_dict(), "head": head.state_dict()}, tmp_path / "best.pth"
        )

        saved = torch.load(tmp_path / "best.pth", weights_only=True)  # what a test program does
        plain, plain_head = nn.DataParallel(embedding()), ScaledRidge()
        plain.load_state_dict(saved["embedding"])
        plain_head.load_state_dict(saved["head"])
        for module in (net, head, plain, plain_head):
            module.eval()
        with torch.no_grad():
            ours = head(net(xq), net(xs), ys)
            assert torch.equal(plain_head(plain(xq), plain(xs), ys), ours)
        assert list(saved["embedding"]) == list(plain.state_dict())


def test_dense_keys_resume_exactly():
    """A dense checkpoint taken while pruned goes back into a pruned model, in either order."""
    schedule = Schedule((Segment(2), Segment(6, sparse=True, sparsity=0.4)))

    def start():
        torch.manual_seed(1)
        net = embedding()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        return net, optimizer, Pruner(net, schedule, optimizer, dense_keys=True)

    def train(net, optimizer, pruner, iterations):
        for iteration in iterations:
            optimizer.zero_grad()
            net(episode(iteration)[0]).square().mean().backward()
            optimizer.step()
            pruner.step()

    whole = start()
    train(*whole, range(7))
    first = start()
    train(*first, range(4))
    saved = [part.state_dict() for part in first]
    for order in ((0, 1, 2), (2, 1, 0)):
        resumed = start()
        for number in order:
            resumed[number].load_state_dict(copy.deepcopy(saved[number]))
        train(*resumed, range(4, 7))
        for a, b in zip(
            whole[0].state_dict().values(), resumed[0].state_dict().values(), strict=True
        ):
            assert torch.equal(a, b)
    other = embedding()
    with pytest.raises(RuntimeError, match="is a dense weight, but the model is pruned"):
        first[0].load_state_dict(other.state_dict())
    first[2].finalize()
    assert not first[0][0]._state_dict_hooks
