from __future__ import annotations

import pytest
import torch
from torch import nn

from l2l_prune.optimizer_state import clear_momentum, level_second_moment, raise_to_gradient

KEPT = torch.tensor([True, True, False, False])


def stepped(make, steps=5):
    """One parameter of four entries after a few steps on known gradients."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = make([parameter])
    for step in range(steps):
        parameter.grad = torch.tensor([1.0, -2.0, 3.0, 0.5]) * (1 + 0.1 * step)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize(
    ("make", "cleared", "untouched"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ["momentum_buffer"], []),
        (
            lambda p: torch.optim.Adam(p, amsgrad=True),
            ["exp_avg"],
            ["exp_avg_sq", "max_exp_avg_sq"],
        ),
        (
            lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
            ["momentum_buffer", "grad_avg"],
            ["square_avg"],
        ),
        (lambda p: torch.optim.Adagrad(p), [], ["sum"]),
        (lambda p: torch.optim.Adamax(p), ["exp_avg"], ["exp_inf"]),
        (lambda p: torch.optim.Rprop(p), ["prev"], ["step_size"]),
        (lambda p: torch.optim.Adadelta(p), [], ["square_avg", "acc_delta"]),
        (lambda p: torch.optim.ASGD(p), ["ax"], []),
    ],
)
def test_clear_momentum_by_state_name(make, cleared, untouched):
    parameter, optimizer = stepped(make)
    before = {k: v.clone() for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}
    clear_momentum(optimizer, parameter, KEPT)
    state = optimizer.state[parameter]
    for key in cleared:
        assert torch.equal(state[key], before[key] * KEPT)
        assert (before[key] != 0).all()
    for key in untouched:
        assert torch.equal(state[key], before[key])


def test_level_second_moment_takes_the_largest_kept():
    parameter, optimizer = stepped(lambda p: torch.optim.Adam(p, amsgrad=True))
    state = optimizer.state[parameter]
    state["exp_avg_sq"].copy_(torch.tensor([0.2, 0.7, 0.1, 0.9]))
    level_second_moment(optimizer, parameter, KEPT, ~KEPT)
    # The last entry has more than any kept one: its own memory is the safer.
    assert torch.allclose(state["exp_avg_sq"], torch.tensor([0.2, 0.7, 0.7, 0.9]))
    level_second_moment(optimizer, parameter, KEPT, torch.zeros(4, dtype=torch.bool))
    assert torch.allclose(state["exp_avg_sq"], torch.tensor([0.2, 0.7, 0.7, 0.9]))


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99)])
def test_raise_to_gradient_bounds_the_next_adam_step(betas):
    """By Adam's own arithmetic: steps of regrown entries against the kept ones' last mean step."""
    parameter, optimizer = stepped(lambda p: torch.optim.Adam(p, lr=1.0, betas=betas), steps=30)
    state = optimizer.state[parameter]
    with torch.no_grad():
        state["exp_avg"][2:] = 0
        state["exp_avg_sq"][2:] = 0
    correction = 1 - betas[1] ** (float(state["step"]) + 1)
    last = (state["exp_avg"] / (state["exp_avg_sq"] / correction).sqrt()).abs()[:2].mean()
    before = parameter.detach().clone()
    parameter.grad = torch.tensor([1.0, 1.0, 1.0, 1e-3])
    raise_to_gradient(optimizer, parameter, KEPT, ~KEPT)
    optimizer.step()
    moved = (parameter.detach() - before).abs()[2:]
    assert (moved > 0).all()
    assert (moved <= 1.01 * min(float(last), 1.0)).all()


def test_without_gradient_or_state_nothing_happens():
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([parameter])
    raise_to_gradient(optimizer, parameter, KEPT, ~KEPT)
    clear_momentum(optimizer, parameter, KEPT)
    level_second_moment(optimizer, parameter, KEPT, ~KEPT)
    assert not optimizer.state.get(parameter)


def test_in_half_precision_a_released_weight_does_not_stop_for_ever():
    """Its second moment would have to be above 65,504: infinity would never decay."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.Adam([parameter], lr=1e-2, eps=1e-4)
    for number in range(2000):  # the kept entries have converged
        parameter.grad = torch.tensor([1e-2, -1e-2, 0, 0], dtype=torch.float16) * (-1) ** number
        optimizer.step()
    parameter.grad = torch.tensor([1e-2, -1e-2, 100.0, 100.0], dtype=torch.float16)
    level_second_moment(optimizer, parameter, KEPT, ~KEPT)
    raise_to_gradient(optimizer, parameter, KEPT, ~KEPT)
    assert optimizer.state[parameter]["exp_avg_sq"].isfinite().all()
    start = parameter.detach().clone()
    for _ in range(200):
        optimizer.step()
    assert (parameter.detach() != start).all()
