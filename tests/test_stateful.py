"""Random sequences of what users do, against a model of the semantics without any masks.

The oracle is a plain copy of the network with its own torch optimizer: gradients are multiplied by
masks that are found by sorting, weights and momentum are zeroed by hand. 200 sequences by default;
``pytest tests/test_stateful.py --hypothesis-profile=nightly`` runs thousands.
"""

from __future__ import annotations

import copy
import io

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.nn.utils import prune

from l2l_prune import PrunedReptile, Pruner, Schedule, Segment, dense_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:finalize")  # in the middle of a schedule
MOMENTA = ("momentum_buffer", "exp_avg")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
}
ARCHITECTURES = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 5, bias=False), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)
    ),
    # a bias before a normalisation has no true gradient, only rounding, which Adagrad scales to 1
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 2, 2), nn.Flatten(), nn.Linear(18, 3)
    ),
}
SEGMENTS = st.builds(
    lambda length, sparsity: (
        Segment(length, sparse=True, sparsity=sparsity) if sparsity else Segment(length)
    ),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.0, 0.3, 0.5, 0.9]),
)
SCHEDULES = st.lists(SEGMENTS, min_size=1, max_size=5).filter(
    lambda segments: sum(s.iterations for s in segments) > 0
)


def segment_at(segments, iteration):
    """Position of the segment of an iteration, from a list with one entry an iteration."""
    owners = [i for i, segment in enumerate(segments) for _ in range(segment.iterations)]
    return owners[min(iteration, len(owners) - 1)]


class Oracle:
    """The semantics, on a network without masks."""

    def __init__(self, net, make_optimizer):
        self.net = copy.deepcopy(net)
        self.optimizer = make_optimizer(self.net.parameters())
        self.names = [
            f"{name}.weight"
            for name, module in self.net.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        ]
        self.masks = {}
        self.segments, self.iteration = None, 0

    def attach(self, segments):
        self.segments, self.iteration = segments, 0
        self.make_masks()

    def make_masks(self):
        segment = self.segments[segment_at(self.segments, self.iteration)]
        weights = dict(self.net.named_parameters())
        self.masks = {}
        for name in self.names:
            weight = weights[name]
            flat = weight.detach().abs().flatten().tolist()
            keep = len(flat) - (round(segment.sparsity * len(flat)) if segment.sparse else 0)
            best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:keep]
            mask = torch.zeros(len(flat), dtype=weight.dtype)
            mask[best] = 1
            self.masks[name] = mask.view(weight.shape)
        self.project()
        for name, mask in self.masks.items():
            for key, value in self.optimizer.state.get(weights[name], {}).items():
                if key in MOMENTA and value is not None:
                    value.mul_(mask)

    @torch.no_grad()
    def project(self):
        for name, parameter in self.net.named_parameters():
            if name in self.masks:
                parameter.mul_(self.masks[name])

    def step(self, x, y):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(x), y).backward()
        for name, parameter in self.net.named_parameters():
            if name in self.masks:
                parameter.grad.mul_(self.masks[name])
        self.optimizer.step()
        self.project()
        if self.segments is not None:
            before = segment_at(self.segments, self.iteration)
            self.iteration += 1
            if segment_at(self.segments, self.iteration) != before:
                self.make_masks()

    def detach(self):
        self.masks, self.segments = {}, None


class Training(RuleBasedStateMachine):
    """One model, its optimizer and its Pruner through whatever may happen to them."""

    @initialize(
        architecture=st.sampled_from(sorted(ARCHITECTURES)),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        segments=SCHEDULES,
        seed=st.integers(0, 99),
        tied=st.booleans(),
    )
    def start(self, architecture, optimizer, segments, seed, tied):
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.make_net = ARCHITECTURES[architecture]
        self.make_optimizer = OPTIMIZERS[optimizer]
        self.net = self.make_net().double()
        if tied:  # equal magnitudes: the lower index stays
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.copy_((parameter * 10).round() / 10)
        self.optimizer = self.make_optimizer(self.net.parameters())
        self.oracle = Oracle(self.net, self.make_optimizer)
        self.pruner = None
        self.identities = [id(p) for p in self.net.parameters()]
        self.attach(segments)

    def attached(self):
        return self.pruner is not None

    def batch(self):
        x = torch.randn(4, 1, 4, 4, generator=self.generator).double()
        return x, torch.randint(0, 3, (4,), generator=self.generator)

    @precondition(lambda self: not self.attached())
    @rule(segments=SCHEDULES)
    def attach(self, segments):
        self.pruner = Pruner(
            self.net, Schedule(tuple(segments)), self.optimizer, release_state="keep"
        )
        self.oracle.attach(segments)

    @rule(times=st.integers(1, 4))
    def train(self, times):
        for _ in range(times):
            x, y = self.batch()
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()
            if self.pruner:
                self.pruner.step()
            self.oracle.step(x, y)

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def change_learning_rate(self, factor):
        for optimizer in (self.optimizer, self.oracle.optimizer):
            for group in optimizer.param_groups:
                group["lr"] = min(group["lr"] * factor, 0.1)

    @rule()
    def through_single_precision(self):
        self.net.float().double()
        self.oracle.net.float().double()

    @rule()
    def evaluate(self):
        x, _ = self.batch()
        with torch.no_grad():
            scores = [net.eval()(x) for net in (self.net, self.oracle.net)]
        torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-10)
        self.net.train(), self.oracle.net.train()

    @rule()
    def copy_and_change_the_copy(self):
        twin = copy.deepcopy(self.net)
        x, y = self.batch()
        torch.testing.assert_close(twin.eval()(x), copy.deepcopy(self.net).eval()(x))
        nn.functional.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert self.is_masked(twin)

    @rule()
    def adapt_a_clone(self):
        """learn2learn's own clone, where it is installed."""
        try:
            import learn2learn as l2l
        except ImportError:
            return
        x, y = self.batch()
        learner = l2l.algorithms.MAML(self.net, lr=0.1).clone()
        learner.adapt(nn.functional.cross_entropy(learner(x), y))
        plain = copy.deepcopy(self.oracle.net)
        loss = nn.functional.cross_entropy(plain(x), y)
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        for (name, parameter), gradient in zip(plain.named_parameters(), gradients, strict=True):
            adapted = parameter - 0.1 * gradient * self.oracle.masks.get(name, 1)
            module, _, tensor = name.rpartition(".")
            found = getattr(learner.module.get_submodule(module), tensor)
            torch.testing.assert_close(found, adapted, rtol=1e-9, atol=1e-10)
        with torch.no_grad():  # the clone shares the model's running statistics
            for mine, theirs in zip(self.net.buffers(), self.net.buffers(), strict=True):
                assert mine is theirs
        self.copy_statistics()

    def copy_statistics(self):
        theirs = dict(self.oracle.net.named_buffers())
        for name, buffer in self.net.named_buffers():
            if name in theirs:
                theirs[name].copy_(buffer)

    @precondition(lambda self: self.attached())
    @rule()
    def save_and_resume(self):
        file = io.BytesIO()
        parts = (self.net, self.optimizer, self.pruner)
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        self.net = self.make_net().double()
        self.optimizer = self.make_optimizer(self.net.parameters())
        self.pruner = Pruner(self.net, self.pruner.schedule, self.optimizer, release_state="keep")
        for part, state in zip((self.net, self.optimizer, self.pruner), states, strict=True):
            part.load_state_dict(state)
        self.identities = [id(p) for p in self.net.parameters()]

    @precondition(lambda self: self.attached())
    @rule()
    def finalize(self):
        assert self.pruner.finalize() is self.net
        assert self.net.state_dict().keys() == self.oracle.net.state_dict().keys()
        self.pruner = None
        self.oracle.detach()

    @precondition(lambda self: not self.attached())
    @rule(segments=SCHEDULES)
    def a_meta_iteration_of_reptile(self, segments):
        """Plain Reptile with SGD: the mean of the adapted weights, under the mask."""
        reptile = PrunedReptile(
            self.net,
            Schedule(tuple(segments)),
            inner_lr=0.1,
            meta_lr=0.5,
            meta_lr_final=0.5,
            inner_optimizer=torch.optim.SGD,
        )
        plain = self.oracle.net
        optimizer = self.oracle.optimizer  # has no part in Reptile: its momentum stays
        self.oracle.optimizer = torch.optim.SGD(plain.parameters())
        self.oracle.attach(segments)
        self.copy_statistics()
        total = [torch.zeros_like(p) for p in plain.parameters()]
        for _ in range(2):
            learner, twin = reptile.clone(), copy.deepcopy(plain)
            for _ in range(2):
                x, y = self.batch()
                learner.adapt(nn.functional.cross_entropy(learner(x), y))
                twin.zero_grad()
                nn.functional.cross_entropy(twin(x), y).backward()
                with torch.no_grad():
                    for name, parameter in twin.named_parameters():
                        mask = self.oracle.masks.get(name, 1)
                        parameter.sub_(0.1 * parameter.grad * mask)
            reptile.collect(learner)
            for held, parameter in zip(total, twin.parameters(), strict=True):
                held.add_(parameter.detach() / 2)
        reptile.step()
        with torch.no_grad():
            for parameter, mean in zip(plain.parameters(), total, strict=True):
                parameter.lerp_(mean, 0.5)
        before = segment_at(segments, 0)
        self.oracle.iteration = 1
        if segment_at(segments, 1) != before:
            self.oracle.make_masks()
        self.oracle.optimizer = optimizer
        assert reptile.finalize() is self.net
        self.oracle.detach()

    def is_masked(self, net):
        for name, mask in self.oracle.masks.items():
            weight = net.get_submodule(name.rpartition(".")[0]).weight
            if not bool((weight[mask == 0] == 0).all()):
                return False
        return True

    @invariant()
    def as_the_oracle_says(self):
        if not hasattr(self, "net"):
            return
        dense = dense_state_dict(self.net)
        for name, value in self.oracle.net.state_dict().items():
            torch.testing.assert_close(dense[name], value, rtol=1e-8, atol=1e-9, msg=name)
        assert self.is_masked(self.net)
        assert [id(p) for p in self.net.parameters()] == self.identities
        names = [name.replace("weight_orig", "weight") for name, _ in self.net.named_parameters()]
        assert names == [name for name, _ in self.oracle.net.named_parameters()]
        assert prune.is_pruned(self.net) == self.attached()
        if self.pruner:
            assert self.pruner.iteration == self.oracle.iteration
            assert self.pruner.masks.keys() == self.oracle.masks.keys()
            for name, mask in self.pruner.masks.items():
                assert torch.equal(mask, self.oracle.masks[name].bool()), name


NIGHTLY = settings.get_profile("nightly")  # of conftest.py
Training.TestCase.settings = (
    NIGHTLY
    if settings().max_examples == NIGHTLY.max_examples
    else settings(max_examples=200, stateful_step_count=15, deadline=None, derandomize=True)
)
TestTraining = Training.TestCase
