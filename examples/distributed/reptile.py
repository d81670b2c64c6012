"""PrunedReptile on several processes, which share the tasks and can be stopped at any time.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 \\
        examples/distributed/reptile.py checkpoint.pt

Every 5 meta-iterations the first rank writes a checkpoint. If a rank is killed, torchrun restarts
all ranks and they continue from it; running the same command again later does so, too. (Without the
variable, restarted ranks may find the addresses of the dead ones in torchrun's store.) The tasks of
a meta-iteration depend only on its number and the rank, so an interrupted run ends with the same
weights as one that was never stopped.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile
from l2l_prune.fewshot import Conv4, EpisodeSampler, Glyphs, minibatches

CHECKPOINT = Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoint.pt")
ITERATIONS = int(sys.argv[2]) if len(sys.argv) > 2 else 40
TASKS = 4  # per meta-iteration, over all ranks


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = Glyphs("train", max_classes=30)
    sampler = EpisodeSampler(data.images, data.labels, ways=5, shots=10, queries=0)
    reptile = PrunedReptile(
        Conv4(ways=5, channels=16),
        DSDSchedule.from_fractions(0.5, ITERATIONS),
        group=dist.group.WORLD,
    )
    if CHECKPOINT.exists():
        reptile.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
    for iteration in range(reptile.iteration, ITERATIONS):
        seed = torch.Generator().manual_seed(iteration * world + rank)
        sampler.load_state_dict({"generator": seed.get_state()})
        for _ in range(TASKS // world):
            task, learner = sampler.sample(), reptile.clone()
            for x, y in minibatches(
                task.support_x, task.support_y, batch_size=10, steps=5, generator=seed
            ):
                learner.adapt(F.cross_entropy(learner(x), y))
            reptile.collect(learner)
        reptile.step()
        if rank == 0 and (iteration + 1) % 5 == 0:
            new = CHECKPOINT.with_suffix(".new")
            torch.save(reptile.state_dict(), new)
            os.replace(new, CHECKPOINT)  # so that a checkpoint is never incomplete
            print(f"{iteration + 1:4d}  {reptile.pruner.segment.label}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
