"""Replays a trace of the authors' TensorFlow program through PrunedReptile's public API.

Run as ``python tests/faithfulness/trace.py TRACE.npz`` to see the differences of any trace of the
layout that shared/DESIGN.md describes (dense, DSD or IHT).
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_prune import PrunedReptile, Schedule, Segment

CONV_BIASES = (1, 5, 9, 13)  # no true gradient before batch normalisation: left out
PRUNED = {4: "convs.1.weight", 8: "convs.2.weight", 12: "convs.3.weight", 16: "classifier.weight"}


class TFAdam(torch.optim.Optimizer):
    """TensorFlow 1's Adam with beta1 = 0: epsilon stands outside the bias correction."""

    def __init__(self, params, lr, beta2=0.999, eps=1e-8):
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["exp_avg_sq"] = 0, torch.zeros_like(p)
                state["step"] += 1
                v = state["exp_avg_sq"]
                v.mul_(group["beta2"]).addcmul_(p.grad, p.grad, value=1 - group["beta2"])
                scale = group["lr"] * (1 - group["beta2"] ** state["step"]) ** 0.5
                p.addcdiv_(p.grad, v.sqrt().add_(group["eps"]), value=-scale)


class OmniglotNet(nn.Module):
    """The authors' Omniglot network: TF 'same' padding, NHWC flatten, BN epsilon 1e-3."""

    def __init__(self, filters: int, classes: int = 5) -> None:
        super().__init__()
        channels = [1, filters, filters, filters, filters]
        self.convs = nn.ModuleList(nn.Conv2d(channels[i], filters, 3, stride=2) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters, eps=1e-3) for _ in range(4))
        self.classifier = nn.Linear(4 * filters, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            before = 0 if x.shape[-1] % 2 == 0 else 1  # TF pads (0, 1) on even sizes
            x = conv(F.pad(x, (before, 1, before, 1)))
            x = F.relu(norm(x))
        return self.classifier(x.permute(0, 2, 3, 1).flatten(1))

    def tf_parameters(self) -> list[nn.Parameter]:
        blocks = [
            p for conv, norm in zip(self.convs, self.norms, strict=True) for p in (conv, norm)
        ]
        listed = []
        for block in (*blocks, self.classifier):
            listed += list(block.parameters())
        return listed


def to_torch(value: np.ndarray) -> Tensor:
    """HWIO kernels to OIHW, dense kernels transposed."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
    return torch.from_numpy(np.ascontiguousarray(value.transpose(axes)))


def schedule_of(trace: dict[str, np.ndarray]) -> Schedule:
    """The trace's phases, with the authors' counts: int(n * rate) + 1 weights pruned."""
    mask_at = {
        int(i): float(r) for i, r in zip(trace["mask_iter"], trace["mask_rate"], strict=True)
    }
    segments: list[tuple[bool, int, float]] = []  # sparse, length, rate
    rate = 0.0
    for i, sparse in enumerate(trace["sparse"]):
        rate = mask_at.get(i, rate)
        if segments and segments[-1][0] == sparse and not (sparse and i in mask_at):
            segments[-1] = (sparse, segments[-1][1] + 1, rate)
        else:
            segments.append((bool(sparse), 1, rate))
    sizes = {name: trace[f"v0_{index}"].size for index, name in PRUNED.items()}
    return Schedule(
        tuple(
            Segment(
                length,
                sparse=sparse,
                keep={n: size - int(size * rate) - 1 for n, size in sizes.items()}
                if sparse
                else None,
            )
            for sparse, length, rate in segments
        )
    )


@dataclass
class Replay:
    """What differed, by meta-iteration and by quantity."""

    weights: list[float]
    masks_equal: list[bool]
    second_moments: float
    logits: float


def replay(path: Path | str, inner_optimizer=TFAdam) -> Replay:
    with np.load(path) as archive:
        trace = {key: archive[key] for key in archive.files}
    net = OmniglotNet(filters=trace["v0_0"].shape[-1])
    with torch.no_grad():
        for index, parameter in enumerate(net.tf_parameters()):
            parameter.copy_(to_torch(trace[f"v0_{index}"]))
    iterations = len(trace["step"])
    step = trace["step"]
    final = step[0] + (step[-1] - step[0]) * iterations / (iterations - 1)
    reptile = PrunedReptile(
        net,
        schedule_of(trace),
        inner_lr=1e-3,
        meta_lr=float(step[0]),
        meta_lr_final=float(max(final, 0.0)),
        inner_optimizer=inner_optimizer,
        layers="authors",
    )
    compared = [k for k in range(18) if k not in CONV_BIASES]
    parameters = net.tf_parameters()
    mask_iter = [int(i) for i in trace["mask_iter"]]
    weights, masks_equal = [], []
    for i in range(iterations):
        if i in mask_iter:
            j = mask_iter.index(i)
            ours = reptile.pruner.masks
            masks_equal += [
                torch.equal(ours[name], to_torch(trace[f"mask{j}_{position}"]).bool())
                for position, name in enumerate(PRUNED.values())
            ]
        for task_x, task_y in zip(trace["x"][i], trace["y"][i], strict=True):
            learner = reptile.clone()
            for x, y in zip(task_x, task_y, strict=True):
                adapt(learner, x, y)
            reptile.collect(learner)
        reptile.step()
        differences = []
        for k in compared:
            theirs = to_torch(trace[f"s{i}_{k}"])
            if i + 1 in mask_iter and k in PRUNED:  # ours is masked now, theirs before i + 1
                j = mask_iter.index(i + 1)
                theirs = theirs * to_torch(trace[f"mask{j}_{list(PRUNED).index(k)}"])
            differences.append(float((parameters[k].detach() - theirs).abs().max()))
        weights.append(max(differences))
    if "av_0" not in trace:
        return Replay(weights, masks_equal, float("nan"), float("nan"))
    moments = [state["exp_avg_sq"] for state in reptile.get_extra_state()["inner_state"]]
    by_parameter = dict(zip((id(p) for p in net.parameters()), moments, strict=True))
    second_moments = max(
        float((by_parameter[id(parameters[k])] - to_torch(trace[f"av_{k}"])).abs().max())
        for k in compared
    )
    learner = reptile.clone()
    for x, y in zip(trace["ex"], trace["ey"], strict=True):
        adapt(learner, x, y)
    logits = learner(images(trace["etx"])).detach() - torch.from_numpy(trace["elog"])
    return Replay(weights, masks_equal, second_moments, float(logits.abs().max()))


def images(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).float()[:, None]


def adapt(learner, x: np.ndarray, y: np.ndarray) -> None:
    logits = learner(images(x))
    learner.adapt(F.cross_entropy(logits, torch.from_numpy(y).long(), reduction="sum"))


if __name__ == "__main__":
    for optimizer in (TFAdam, functools.partial(torch.optim.Adam, betas=(0.0, 0.999))):
        print(optimizer, replay(sys.argv[1], optimizer))
