"""A timm transformer (vit_tiny) with ProtoNet's or MetaOptNet's heads, pruned on glyphs.

python timm_vit.py [ITERATIONS] [prototype | ridge | svm]

The lines marked l2l_prune are all that pruning adds to the loop.
"""

import sys

import timm
import torch

from l2l_prune import DSDSchedule, Pruner  # l2l_prune
from l2l_prune.fewshot import EpisodeSampler, Glyphs
from l2l_prune.metalearners.metaoptnet import MetaOptNet, smoothed_cross_entropy

WAYS, SHOTS, QUERIES, TASKS = 5, 1, 3, 2
SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 0, "depth": 2}


def main():
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    head = sys.argv[2] if len(sys.argv) > 2 else "prototype"
    torch.manual_seed(0)
    glyphs = Glyphs("train")
    tasks = EpisodeSampler(
        glyphs.images, glyphs.labels, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=0
    )
    model = MetaOptNet(timm.create_model("vit_tiny_patch16_224", **SMALL), head=head)
    opt = torch.optim.AdamW(model.parameters(), 3e-4)
    schedule = DSDSchedule.from_fractions(0.3, iterations)  # l2l_prune
    pruner = Pruner(model, schedule, optimizer=opt)  # l2l_prune
    for iteration in range(iterations):
        episodes = zip(*(tasks.sample() for _ in range(TASKS)), strict=True)
        xs, ys, xq, yq = map(torch.stack, episodes)
        scores = model(xs, ys, xq)
        opt.zero_grad()
        smoothed_cross_entropy(scores, yq).backward()
        opt.step()
        pruner.step()  # l2l_prune
        if iteration % 10 == 0:
            accuracy = float((scores.argmax(-1) == yq).float().mean())
            print(f"{iteration:4d}  accuracy {accuracy:.2f}")
    pruner.finalize()  # l2l_prune


if __name__ == "__main__":
    main()
