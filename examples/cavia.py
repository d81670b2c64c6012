"""CAVIA with dense-sparse-dense training on glyphs: only the network is pruned, not the context.

The lines marked l2l_prune are all that pruning adds to the loop.
"""

import sys

import torch
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner  # l2l_prune
from l2l_prune.fewshot import CaviaConv4, EpisodeSampler, Glyphs
from l2l_prune.metalearners import CAVIA

ITERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 150
WAYS, SHOTS, QUERIES, TASKS = 5, 1, 5, 4


def main():
    torch.manual_seed(0)
    glyphs = Glyphs("train")
    tasks = EpisodeSampler(
        glyphs.images, glyphs.labels, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=0
    )
    cavia = CAVIA(CaviaConv4(WAYS, channels=32, in_channels=1, image_size=28), lr=1.0)
    opt = torch.optim.Adam(cavia.parameters(), 3e-3)
    schedule = DSDSchedule.from_fractions(0.1, ITERATIONS)  # l2l_prune
    pruner = Pruner(cavia, schedule, optimizer=opt)  # l2l_prune
    for iteration in range(ITERATIONS):
        opt.zero_grad()
        accuracy = 0.0
        for _ in range(TASKS):
            task = tasks.sample()
            learner = cavia.clone()
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(task.support_x), task.support_y))
            scores = learner(task.query_x)
            (F.cross_entropy(scores, task.query_y) / TASKS).backward()
            accuracy += float((scores.argmax(1) == task.query_y).float().mean()) / TASKS
        torch.nn.utils.clip_grad_value_(cavia.parameters(), 10)
        opt.step()
        pruner.step()  # l2l_prune
        if iteration % 10 == 0:
            print(f"{iteration:4d}  accuracy {accuracy:.2f}")
    pruner.finalize()  # l2l_prune


if __name__ == "__main__":
    main()
