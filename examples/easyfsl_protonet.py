"""easyfsl's prototypical networks, sampler and ResNet with dense-sparse-dense training on glyphs.

The lines marked l2l_prune are all that pruning adds to easyfsl's own episodic training.
"""

import sys

import torch
from easyfsl.datasets import FewShotDataset
from easyfsl.methods import PrototypicalNetworks
from easyfsl.modules.predesigned_modules import resnet10
from easyfsl.samplers import TaskSampler
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from l2l_prune import DSDSchedule, Pruner  # l2l_prune
from l2l_prune.fewshot import Glyphs

WAYS, SHOTS, QUERIES = 5, 1, 3


class GlyphsDataset(FewShotDataset):
    """Glyphs in the form that easyfsl expects: with three colour channels, and with labels."""

    def __init__(self):
        self.glyphs = Glyphs("train")

    def __getitem__(self, number):
        image = self.glyphs.images[number].float().div(255).expand(3, -1, -1)
        return image, int(self.glyphs.labels[number])

    def __len__(self):
        return len(self.glyphs.labels)

    def get_labels(self):
        return self.glyphs.labels.tolist()


class DataSource(Sampler):
    """Drops the argument that easyfsl 1.5.0 passes, which torch's Sampler no longer takes."""

    def __init__(self, data_source=None):
        super().__init__()


class Tasks(TaskSampler, DataSource):
    """easyfsl's sampler, made to work with old and new versions of torch."""


def main():
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    torch.manual_seed(0)
    data = GlyphsDataset()
    sampler = Tasks(data, WAYS, SHOTS, QUERIES, n_tasks=iterations)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    model = PrototypicalNetworks(resnet10(planes=[16, 16, 32, 64]))
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = DSDSchedule.from_fractions(0.3, iterations)  # l2l_prune
    pruner = Pruner(model, schedule, optimizer=opt)  # l2l_prune
    for iteration, (xs, ys, xq, yq, _) in enumerate(loader):
        opt.zero_grad()
        model.process_support_set(xs, ys)
        scores = model(xq)
        F.cross_entropy(scores, yq).backward()
        opt.step()
        pruner.step()  # l2l_prune
        if iteration % 10 == 0:
            print(f"{iteration:4d}  accuracy {float((scores.argmax(1) == yq).float().mean()):.2f}")
    pruner.finalize()  # l2l_prune


if __name__ == "__main__":
    main()
