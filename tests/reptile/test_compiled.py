"""Compiled inner steps give what plain ones give."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from l2l_prune import DSDSchedule, PrunedReptile
from l2l_prune.channels.pruner import Structured
from l2l_prune.fewshot.data import Episode
from l2l_prune.fewshot.evaluation import few_shot_accuracy
from l2l_prune.reptile.compiled import CompiledStep
from l2l_prune.reptile.learner import adam
from tests.conftest import SmallNet, needs_compiler, without_compiler

SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=2, retrain=2)
OPTIMIZERS = {
    "default": adam,
    "decay": functools.partial(adam, weight_decay=0.5),
    "Adam": functools.partial(torch.optim.Adam, betas=(0.8, 0.9), weight_decay=0.1),
    "maximize": functools.partial(torch.optim.AdamW, maximize=True),
    "amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),  # steps outside the graph
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "tensor": lambda parameters, lr: torch.optim.Adam(parameters, torch.tensor(lr).double()),
}
if "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters:  # since torch 2.7
    OPTIMIZERS["decoupled"] = functools.partial(
        torch.optim.Adam, weight_decay=0.5, decoupled_weight_decay=True
    )


def loss(learner, x, y):
    return F.cross_entropy(learner(x), y)


def plainly(learner, x, y):
    learner.adapt(loss(learner, x, y))


def make(net, **options):
    return PrunedReptile(copy.deepcopy(net).double(), SCHEDULE, inner_lr=0.01, **options)


def train(reptile, step, iterations=SCHEDULE.iterations, start=0):
    for iteration in range(start, iterations):
        generator = torch.Generator().manual_seed(iteration)
        for _ in range(2):
            learner = reptile.clone()
            for _ in range(3):
                x = torch.randn(6, 1, 6, 6, generator=generator)
                y = torch.randint(0, 3, (6,), generator=generator)
                step(learner, x.to(next(learner.parameters()).dtype), y)
            for name, mask in reptile.pruner.masks.items() if reptile.pruner.sparse else ():
                assert (learner.module.get_parameter(name)[~mask] == 0).all()
            reptile.collect(learner)
        reptile.step()
    return reptile


def assert_same(one, other, atol=1e-10):
    """The bias before batch normalisation has no true gradient: Adam steps on its noise."""
    states = one.state_dict(), other.state_dict()
    for name, expected in states[0].items():
        if isinstance(expected, torch.Tensor) and name != "module.conv1.bias":
            torch.testing.assert_close(states[1][name], expected, rtol=0, atol=atol, msg=name)


def train_alike(net, **options):
    """Plain and (uncompiled) compiled steps from one start, which must end alike; the latter's."""
    plain, ours = make(net, **options), make(net, **options)
    train(plain, plainly)
    with without_compiler():
        train(ours, CompiledStep(loss))
    assert_same(plain, ours)
    return ours


@pytest.mark.parametrize("foml", [False, True])
@pytest.mark.parametrize("carry_state", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_function_before_compilation_is_the_plain_step(net, optimizer, carry_state, foml):
    train_alike(net, inner_optimizer=OPTIMIZERS[optimizer], carry_state=carry_state, foml=foml)


@needs_compiler
@pytest.mark.parametrize("optimizer", ["default", "SGD"])
def test_compiled_steps_are_plain_steps(net, optimizer):
    torch._dynamo.reset()
    counters.clear()
    plain, ours = (make(net, inner_optimizer=OPTIMIZERS[optimizer]) for _ in range(2))
    train(plain, plainly)
    train(ours, CompiledStep(loss))
    assert_same(plain, ours)
    # The loss; and Adam's update, with masks and without.
    assert counters["stats"]["unique_graphs"] == (3 if optimizer == "default" else 1)
    assert not counters["graph_break"]


@needs_compiler
def test_batch_statistics_move_as_in_plain_steps(net):
    x, y = torch.randn(6, 1, 6, 6).double(), torch.randint(0, 3, (6,))
    buffers = []
    for step in (plainly, CompiledStep(loss)):
        learner = make(net, inner_optimizer=torch.optim.SGD).clone()
        for _ in range(3):
            step(learner, x, y)
        buffers.append(dict(learner.module.named_buffers()))
    assert buffers[1]["norm.num_batches_tracked"] == 3
    for name, buffer in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], buffer)


def test_weights_that_the_loss_does_not_reach_stay(net):
    """An optimizer leaves them alone, where a gradient of zeros would let them decay."""
    net.spare = nn.Linear(2, 2)
    net.norm.weight.requires_grad_(False)
    before = copy.deepcopy(net.spare).double().state_dict()
    ours = train_alike(net, inner_optimizer=OPTIMIZERS["decay"], skip="spare")
    for name, weight in ours.module.spare.state_dict().items():
        assert torch.equal(weight, before[name])
    assert (ours.module.norm.weight == 1).all()


class TwoHeads(nn.Module):
    """A second head on the small net; which one speaks is up to the caller."""

    def __init__(self, net):
        super().__init__()
        self.net, self.other = net, nn.Linear(3, 3)

    def forward(self, x, second):
        x = self.net(x)
        return self.other(x) if second else x


def train_heads(net, step, of_head, **options):
    """The second head is reached by the middle steps only; weights and state at the end."""
    torch.manual_seed(1)
    reptile = make(TwoHeads(copy.deepcopy(net)), **options)
    reptile.collect(reptile.clone())
    reptile.step()  # sparse from here on
    learner = reptile.clone()
    for number, x in enumerate(torch.randn(6, 5, 1, 6, 6).double()):
        step(learner, x, torch.arange(5) % 3, of_head(number))
    optimizer = learner.workspace.optimizer
    state = {
        f"{name} {key}": value
        for name, parameter in learner.module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {**learner.module.state_dict(), **state}


def assert_heads_alike(net, optimizer):
    torch.manual_seed(1)

    def loss(learner, x, y, second):
        return F.cross_entropy(learner(x, second), y)

    def plainly(learner, *data):
        learner.adapt(loss(learner, *data))

    def second(number):
        return number in (2, 3)

    options = {"inner_optimizer": OPTIMIZERS[optimizer]}
    expected = train_heads(net, plainly, second, **options)
    found = train_heads(net, CompiledStep(loss), second, **options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "conv1.bias" not in name:  # see assert_same
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=name)
    started = train_heads(net, plainly, lambda number: False, **options)
    assert not torch.equal(started["other.weight"], found["other.weight"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_head_that_only_some_losses_reach_moves_with_these(net, optimizer):
    """It neither stays for good where the first loss misses it, nor drifts once it was reached."""
    with without_compiler():
        assert_heads_alike(net, optimizer)


@needs_compiler
def test_a_head_that_only_some_losses_reach_moves_when_compiled():
    assert_heads_alike(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), "decay")


@pytest.mark.parametrize("change", ["option", "hook", "global hook", "own step"])
def test_what_is_not_known_of_an_optimizer_is_left_to_it(net, monkeypatch, change):
    """Its own ``step`` runs then, with all that hangs on it."""
    ran = []

    def note(*args):
        ran.append(args)

    def factory(parameters, lr):
        optimizer = torch.optim.Adam(parameters, lr)
        step = torch.optim.Adam.step
        if change == "option":
            optimizer.param_groups[0]["of_a_later_torch"] = 1
            monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (note(), step(self)))
        elif change == "hook":
            optimizer.register_step_post_hook(note)
        elif change == "own step":
            optimizer.step = lambda: (note(), step(optimizer))
        return optimizer

    reptile = make(net, inner_optimizer=factory)
    learner, step = reptile.clone(), CompiledStep(loss)
    x, y = torch.randn(6, 1, 6, 6).double(), torch.arange(6) % 3
    hook = register_optimizer_step_post_hook(note) if change == "global hook" else None
    try:
        with without_compiler():
            for count in (1, 2, 3):
                step(learner, x, y)
                assert len(ran) == count
    finally:
        if hook is not None:
            hook.remove()


def test_channels_that_are_cut_out_and_regrown(net):
    pytest.importorskip("torch_pruning")
    train_alike(net, structured=Structured(torch.zeros(1, 1, 6, 6).double()))


@needs_compiler
def test_resumes_bit_exactly(net):
    step = CompiledStep(loss)
    whole, resumed = make(net), make(net)
    train(whole, step, iterations=2)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(whole, step, iterations=5, start=2)
    train(resumed, CompiledStep(loss), iterations=5, start=2)  # another process has its own
    assert_same(whole, resumed, atol=0)
    assert torch.equal(whole.module.conv1.bias, resumed.module.conv1.bias)


@needs_compiler
def test_autocast_follows_the_plain_path(net):
    def in_bf16(learner, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(learner(x), y)

    weights = {}
    for name, step in (("float32", plainly), ("bf16", CompiledStep(in_bf16))):
        reptile = PrunedReptile(
            copy.deepcopy(net), SCHEDULE, inner_lr=0.01, inner_optimizer=torch.optim.SGD
        )
        train(reptile, step, iterations=2)
        weights[name] = torch.cat([p.detach().flatten() for p in reptile.module.parameters()])
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    apart = (weights["bf16"] - weights["float32"]).norm() / (weights["float32"] - start).norm()
    assert 0 < apart < 0.1


@needs_compiler
def test_evaluation_by_compiled_steps(net):
    reptile = make(net)
    episodes = [
        Episode(torch.randn(12, 1, 6, 6).double(), torch.arange(12) % 3, x, torch.arange(9) % 3)
        for x in torch.randn(4, 9, 1, 6, 6).double()
    ]
    evaluate = functools.partial(few_shot_accuracy, reptile, episodes, steps=5, batch_size=6)
    before = str(reptile.state_dict())
    found = [
        evaluate(step=step, generator=torch.Generator().manual_seed(0)).values
        for step in (None, CompiledStep(loss))
    ]
    assert found[0] == found[1]
    assert str(reptile.state_dict()) == before
    with pytest.raises(ValueError, match="one learner at a time"):
        evaluate(step=plainly, tasks_at_once=2)


def test_old_torch_is_told(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(RuntimeError, match=r"torch 2\.6 or newer, this is 2\.5\.1"):
        CompiledStep(loss)


def test_misuse_is_told(net, batch):
    with pytest.raises(TypeError, match=r"loss must be a function loss\(learner"):
        CompiledStep(torch.ones(1))
    x, y = batch
    reptile = PrunedReptile(net, SCHEDULE, inner_optimizer=torch.optim.SGD)
    learner = reptile.clone()
    for wrong, error, message in (
        (lambda learner, x, y: x.sum(), RuntimeError, "does not depend on this learner"),
        (lambda learner, x, y: learner(x), ValueError, "loss must be one number"),
        (lambda learner, x, y: 1.0, TypeError, "loss must be"),
    ):
        with without_compiler(), pytest.raises(error, match=message):
            CompiledStep(wrong)(learner, x, y)
    for name, parameter in SmallNet.named_parameters(net):
        if not name.endswith("_orig"):
            assert torch.equal(learner.module.get_parameter(name), parameter)
    reptile.collect(learner)
    with pytest.raises(RuntimeError, match="was collected"):
        CompiledStep(loss)(learner, x, y)
