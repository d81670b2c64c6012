"""CAVIA with iterative hard thresholding on sines.

The settings are those of CAVIA's own regression script, which takes 50,000 steps.

The lines marked l2l_prune are all that pruning adds to the loop.
"""

import sys

import torch
from torch.nn import functional as F

from l2l_prune import IHTSchedule, Pruner  # l2l_prune
from l2l_prune.fewshot import CaviaMLP, SineTasks
from l2l_prune.metalearners import CAVIA

ITERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 500
TASKS = 25  # in a meta-batch


def main():
    torch.manual_seed(0)
    sine = SineTasks(shots=10, queries=10)
    cavia = CAVIA(CaviaMLP(), lr=1.0)
    opt = torch.optim.Adam(cavia.parameters(), 1e-3)
    schedule = IHTSchedule.from_fractions(0.1, ITERATIONS)  # l2l_prune
    pruner = Pruner(cavia, schedule, optimizer=opt)  # l2l_prune
    for iteration in range(ITERATIONS):
        opt.zero_grad()
        error = 0.0
        for _ in range(TASKS):
            task = sine.sample()
            learner = cavia.clone()
            learner.adapt(F.mse_loss(learner(task.support_x), task.support_y))
            loss = F.mse_loss(learner(task.query_x), task.query_y) / TASKS
            loss.backward()
            error += loss.item()
        torch.nn.utils.clip_grad_value_(cavia.parameters(), 10)
        opt.step()
        pruner.step()  # l2l_prune
        if iteration % 50 == 0:
            print(f"{iteration:4d}  mean squared error {error:.2f}")
    pruner.finalize()  # l2l_prune


if __name__ == "__main__":
    main()
