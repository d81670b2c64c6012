"""MAML with TorchOpt's differentiable optimizer, with dense-sparse-dense training on glyphs.

The lines marked l2l_prune are all that pruning adds to TorchOpt's own loop.
"""

import sys

import torch
import torchopt
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner  # l2l_prune
from l2l_prune.fewshot import Conv4, EpisodeSampler, Glyphs

WAYS, SHOTS, QUERIES, TASKS = 5, 1, 1, 4
INNER_STEPS = 1


def meta_backward(model, inner, episodes):
    """Put the mean query loss's gradients into ``.grad``; return the mean accuracy."""
    weights = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
    state = torchopt.extract_state_dict(inner, by="reference")
    accuracy = 0.0
    for xs, ys, xq, yq in episodes:
        for _ in range(INNER_STEPS):
            inner.step(F.cross_entropy(model(xs), ys))
        scores = model(xq)
        (F.cross_entropy(scores, yq) / len(episodes)).backward()
        accuracy += float((scores.argmax(1) == yq).float().mean()) / len(episodes)
        torchopt.recover_state_dict(model, weights)
        torchopt.recover_state_dict(inner, state)
    return accuracy


def main():
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    torch.manual_seed(0)
    glyphs = Glyphs("train")
    tasks = EpisodeSampler(
        glyphs.images, glyphs.labels, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=0
    )
    model = Conv4(WAYS, channels=32)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = DSDSchedule.from_fractions(0.3, iterations)  # l2l_prune
    pruner = Pruner(model, schedule, optimizer=opt)  # l2l_prune
    inner = torchopt.MetaSGD(model, lr=0.5)
    for iteration in range(iterations):
        opt.zero_grad()
        accuracy = meta_backward(model, inner, [tasks.sample() for _ in range(TASKS)])
        opt.step()
        pruner.step()  # l2l_prune
        if iteration % 10 == 0:
            print(f"{iteration:4d}  accuracy {accuracy:.2f}")
    pruner.finalize()  # l2l_prune


if __name__ == "__main__":
    main()
