"""Does the sampler feed the trainer? Time to draw the tasks of a meta-iteration.

Each round draws 5 tasks of 5 ways with 15 shots (the paper's training) with our sampler and with
learn2learn's Taskset on the same images, and does the forward and backward passes of the
meta-iteration (5 x 8 minibatches of 10, conv4 with 64 channels); ratios are to the passes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import learn2learn as l2l
import numpy as np
import torch
from torch.utils.data import TensorDataset

from benchmarks.timing import interleaved, rows, show
from benchmarks.workload import BATCH, STEPS, WAYS, colours, conv4, device, passes
from l2l_prune.fewshot import EpisodeSampler, Glyphs, minibatches

TASKS, SHOTS = 5, 15


def mapped_colour_images(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """64 classes of 100 images of 84x84 in the form in which the benchmarks' caches are kept."""
    shape = (6400, 3, 84, 84)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    random = np.random.default_rng(0)
    for start in range(0, len(images), 640):
        images[start : start + 640] = random.integers(0, 256, (640, *shape[1:]), np.uint8)
    return torch.from_numpy(np.load(folder / "images.npy", mmap_mode="r+")), torch.arange(64)


def training(images: torch.Tensor) -> Callable[[], None]:
    size = images.shape[-1]
    net = conv4(size, memory_format=torch.contiguous_format)
    x = torch.rand(WAYS * SHOTS, colours(size), size, size).to(device())
    y = torch.arange(WAYS).repeat(SHOTS).to(device())

    def forward_and_backward() -> None:
        for _ in range(TASKS):
            passes(net, minibatches(x, y, batch_size=BATCH, steps=STEPS))

    return forward_and_backward


def taskset(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    data = l2l.data.MetaDataset(TensorDataset(images, labels))
    transforms = l2l.data.transforms
    tasks = l2l.data.Taskset(
        data,
        [
            transforms.NWays(data, WAYS),
            transforms.KShots(data, SHOTS),
            transforms.LoadData(data),
            transforms.RemapLabels(data),
        ],
    )

    def draw() -> None:
        for _ in range(TASKS):
            x, _ = tasks.sample()
            x = x.float() / 255

    return draw


def ours(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    sampler = EpisodeSampler(images, labels, ways=WAYS, shots=SHOTS, queries=0)
    return lambda: [sampler.sample() for _ in range(TASKS)]


def main(rounds: int) -> None:
    glyphs = Glyphs("train")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        colour, classes = mapped_colour_images(Path(folder))
        sets = {
            "glyphs 28x28": (glyphs.images, glyphs.labels),
            "colour 84x84, mapped": (colour, classes.repeat_interleave(100)),
        }
        for name, (images, labels) in sets.items():
            variants = {
                "passes": training(images),
                "our sampler": ours(images, labels),
                "learn2learn's Taskset": taskset(images, labels),
            }
            table += rows(interleaved(variants, rounds), "passes", name)
    headers = ("images", "5 tasks", "seconds", "ratio", "middle half")
    show(__doc__.split("\n")[0], headers, table)
