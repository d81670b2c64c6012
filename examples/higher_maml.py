"""MAML through higher, with dense-sparse-dense training on glyphs.

The lines marked l2l_prune are all that pruning adds to higher's own loop.
"""

import sys

import higher
import learn2learn as l2l
import torch
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner  # l2l_prune
from l2l_prune.fewshot import glyphs_tasksets

ITERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
WAYS, SHOTS, TASKS = 5, 1, 4


def split(task):
    """Support and query halves of a task of 2 * SHOTS examples a class."""
    x, y = task
    support = torch.arange(len(y)) % (2 * SHOTS) < SHOTS
    return x[support], y[support], x[~support], y[~support]


def main():
    torch.manual_seed(0)
    tasks = glyphs_tasksets(train_ways=WAYS, train_samples=2 * SHOTS).train
    model = l2l.vision.models.OmniglotCNN(WAYS, hidden_size=32)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = DSDSchedule.from_fractions(0.3, ITERATIONS)  # l2l_prune
    pruner = Pruner(model, schedule, optimizer=opt)  # l2l_prune
    for iteration in range(ITERATIONS):
        opt.zero_grad()
        accuracy = 0.0
        for _ in range(TASKS):
            xs, ys, xq, yq = split(tasks.sample())
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (
                learner,
                diffopt,
            ):
                diffopt.step(F.cross_entropy(learner(xs), ys))
                scores = learner(xq)
                (F.cross_entropy(scores, yq) / TASKS).backward()
            accuracy += float((scores.argmax(1) == yq).float().mean()) / TASKS
        opt.step()
        pruner.step()  # l2l_prune
        if iteration % 10 == 0:
            print(f"{iteration:4d}  accuracy {accuracy:.2f}")
    pruner.finalize()  # l2l_prune


if __name__ == "__main__":
    main()
