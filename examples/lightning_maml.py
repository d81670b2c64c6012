"""learn2learn's LightningMAML with dense-sparse-dense training on glyphs.

The lines marked l2l_prune are all that pruning adds to Lightning's own loop.
"""

import sys

import learn2learn as l2l
import pytorch_lightning as pl
from learn2learn.algorithms.lightning import LightningMAML
from torch.utils.data import DataLoader

from l2l_prune import DSDSchedule  # l2l_prune
from l2l_prune.fewshot import glyphs_tasksets
from l2l_prune.integrations.lightning import PruningCallback  # l2l_prune

ITERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
WAYS, SHOTS = 5, 1


def main():
    pl.seed_everything(0)
    tasks = glyphs_tasksets(train_ways=WAYS, train_samples=2 * SHOTS, num_tasks=ITERATIONS).train
    shape = {"train_ways": WAYS, "train_shots": SHOTS, "train_queries": SHOTS, "test_ways": WAYS}
    model = l2l.vision.models.OmniglotCNN(WAYS, hidden_size=32)
    module = LightningMAML(model, adaptation_lr=0.5, lr=3e-3, **shape)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    schedule = DSDSchedule.from_fractions(0.3, ITERATIONS)  # l2l_prune
    trainer.callbacks.append(PruningCallback(schedule))  # l2l_prune
    trainer.fit(module, DataLoader(tasks, batch_size=None))


if __name__ == "__main__":
    main()
