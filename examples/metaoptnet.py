"""MetaOptNet (SVM head) with dense-sparse-dense training on glyphs, small enough for a CPU.

The lines marked l2l_prune are all that pruning adds to the loop. For the published network
use ``resnet12(84, 3, drop_block=False)`` as the features.
"""

import sys

import torch
from torch import nn

from l2l_prune import DSDSchedule, Pruner  # l2l_prune
from l2l_prune.fewshot import Conv4, EpisodeSampler, Glyphs
from l2l_prune.metalearners.metaoptnet import (
    MetaOptNet,
    published_lr_factor,
    smoothed_cross_entropy,
)

ITERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
WAYS, SHOTS, QUERIES, TASKS = 5, 3, 4, 4


def main():
    torch.manual_seed(0)
    glyphs = Glyphs("train")
    tasks = EpisodeSampler(
        glyphs.images, glyphs.labels, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=0
    )
    model = MetaOptNet(nn.Sequential(Conv4(WAYS, channels=32).features, nn.Flatten()))
    opt = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: published_lr_factor(n / ITERATIONS))
    schedule = DSDSchedule.from_fractions(0.2, ITERATIONS)  # l2l_prune
    pruner = Pruner(model, schedule, optimizer=opt)  # l2l_prune
    for iteration in range(ITERATIONS):
        episodes = [tasks.sample() for _ in range(TASKS)]
        xs, ys, xq, yq = map(torch.stack, zip(*episodes, strict=True))
        scores = model(xs, ys, xq)
        opt.zero_grad()
        smoothed_cross_entropy(scores, yq).backward()
        opt.step()
        pruner.step()  # l2l_prune
        steps.step()
        if iteration % 10 == 0:
            accuracy = float((scores.argmax(-1) == yq).float().mean())
            print(f"{iteration:4d}  accuracy {accuracy:.2f}")
    pruner.finalize()  # l2l_prune


if __name__ == "__main__":
    main()
