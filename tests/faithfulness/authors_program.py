"""A plain re-reading of the authors' training loop on lists of tensors, to make IHT traces.

It shares no code with l2l_prune: masks by their threshold rule, applied before each inner step
and after the meta update; unmasked gradients; Adam state carried over.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PRUNED = (4, 8, 12, 16)


def logits(weights: list[Tensor], x: Tensor) -> Tensor:
    for block in range(4):
        kernel, bias, gamma, beta = weights[4 * block : 4 * block + 4]
        before = x.shape[-1] % 2
        x = F.conv2d(F.pad(x, (before, 1, before, 1)), kernel.permute(3, 2, 0, 1), bias, stride=2)
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-3).sqrt()
        x = F.relu(x * gamma[None, :, None, None] + beta[None, :, None, None])
    return x.permute(0, 2, 3, 1).flatten(1) @ weights[16] + weights[17]


def masks_of(weights: list[Tensor], rate: float) -> list[np.ndarray]:
    masks = []
    for k in PRUNED:
        size = np.abs(weights[k].numpy())
        threshold = np.sort(size.reshape(-1))[int(size.size * rate)]
        masks.append(size > threshold)
    return masks


def apply(weights: list[Tensor], masks: list[np.ndarray]) -> list[Tensor]:
    weights = list(weights)
    for k, mask in zip(PRUNED, masks, strict=True):
        weights[k] = weights[k] * torch.from_numpy(mask)
    return weights


def run(trace: dict[str, np.ndarray], mask_rates: dict[int, float], sparse: list[bool]):
    """Yields (iteration, weights after it, masks made at its start or None)."""
    weights = [torch.from_numpy(trace[f"v0_{k}"]) for k in range(18)]
    second = [torch.zeros_like(w) for w in weights]
    steps, masks = 0, None
    for i, epsilon in enumerate(trace["step"]):
        made = None
        if i in mask_rates:
            made = masks = masks_of(weights, mask_rates[i])
            weights = apply(weights, masks)
        adapted = []
        for task_x, task_y in zip(trace["x"][i], trace["y"][i], strict=True):
            new = weights
            for x, y in zip(task_x, task_y, strict=True):
                if sparse[i]:
                    new = apply(new, masks)
                leaves = [w.clone().requires_grad_() for w in new]
                scores = logits(leaves, torch.from_numpy(x).float()[:, None])
                loss = F.cross_entropy(scores, torch.from_numpy(y).long(), reduction="sum")
                gradients = torch.autograd.grad(loss, leaves)
                steps += 1
                rate = 1e-3 * (1 - 0.999**steps) ** 0.5
                second = [0.999 * v + 0.001 * g * g for v, g in zip(second, gradients, strict=True)]
                new = [
                    w - rate * g / (v.sqrt() + 1e-8)
                    for w, g, v in zip(new, gradients, second, strict=True)
                ]
            adapted.append(new)
        means = [torch.stack(group).mean(0) for group in zip(*adapted, strict=True)]
        weights = [w + float(epsilon) * (m - w) for w, m in zip(weights, means, strict=True)]
        if sparse[i]:
            weights = apply(weights, masks)
        yield i, weights, made


def write_iht_trace(source: Path, target: Path, *, always_sparse: bool) -> None:
    """An IHT trace on the inputs of the DSD trace: three rounds of 3 from iteration 1."""
    with np.load(source) as archive:
        trace = dict(archive)
    check_against_dsd(trace)
    rates = {1: 0.1, 4: 0.25, 7: 0.4}
    sparse = [i >= 1 and ((i - 1) % 3 < 2 or always_sparse) for i in range(10)]
    for key in [k for k in trace if k.startswith(("mask", "s", "av_"))]:
        if key != "step":
            del trace[key]
    trace["sparse"] = np.array(sparse)
    trace["mask_iter"], trace["mask_rate"] = np.array(list(rates)), np.array(list(rates.values()))
    for i, weights, made in run(trace, rates, sparse):
        trace |= {f"s{i}_{k}": w.numpy() for k, w in enumerate(weights)}
        if made is not None:
            j = list(rates).index(i)
            trace |= {f"mask{j}_{position}": mask for position, mask in enumerate(made)}
    np.savez(target, **trace)


def check_against_dsd(trace: dict[str, np.ndarray]) -> None:
    """This re-reading must itself agree with the authors' recorded DSD run."""
    worst = 0.0
    for i, weights, _ in run(trace, {3: 0.3}, list(trace["sparse"])):
        for k in set(range(18)) - {1, 5, 9, 13}:
            worst = max(
                worst, float((weights[k] - torch.from_numpy(trace[f"s{i}_{k}"])).abs().max())
            )
    assert worst < 2e-4, worst
