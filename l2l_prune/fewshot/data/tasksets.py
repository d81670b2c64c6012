"""Data sets as learn2learn tasksets, for use in a learn2learn loop like its own benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from l2l_prune.fewshot.data.cache import Images
from l2l_prune.fewshot.data.folder import load_folder
from l2l_prune.fewshot.data.glyphs import Glyphs


class Tasksets(NamedTuple):
    """The three splits, like learn2learn's ``BenchmarkTasksets``."""

    train: Any
    validation: Any
    test: Any


def glyphs_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    *,
    max_classes: int | None = None,
    **options: Any,
) -> Tasksets:
    """Tasksets of glyphs, made as ``learn2learn.vision.benchmarks.get_tasksets`` makes its own.

    Args:
        train_ways: Classes in a training task.
        train_samples: Examples of each class in a training task (support and query together).
        test_ways: Classes in a validation or test task.
        test_samples: Examples of each class in a validation or test task.
        num_tasks: Number of tasks in a taskset; -1 for a fresh one at each draw.
        max_classes: Number of training characters, all by default.
        **options: Further arguments of :class:`Glyphs`, except ``split``.

    Returns:
        ``learn2learn.data.Taskset`` for train, validation and test; a draw gives
        ``(images [ways * samples, 1, 28, 28], labels [ways * samples])``.

    Raises:
        ImportError: If learn2learn is missing.
    """

    def glyphs(split: str) -> Glyphs:
        return Glyphs(split, max_classes=max_classes if split == "train" else None, **options)

    return _tasksets(glyphs, (train_ways, train_samples), (test_ways, test_samples), num_tasks)


def folder_tasksets(
    root: str | os.PathLike[str],
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    **options: Any,
) -> Tasksets:
    """Tasksets of your own images, like :func:`glyphs_tasksets`.

    Args:
        root: Their folder, as for :func:`load_folder`.
        train_ways: Classes in a training task.
        train_samples: Examples of each class in a training task (support and query together).
        test_ways: Classes in a validation or test task.
        test_samples: Examples of each class in a validation or test task.
        num_tasks: Number of tasks in a taskset; -1 for a fresh one at each draw.
        **options: Further arguments of :func:`load_folder`, except ``split``.

    Returns:
        ``learn2learn.data.Taskset`` for train, validation and test; a draw gives
        ``(images [ways * samples, C, H, W] in [0, 1], labels [ways * samples])``.

    Raises:
        ImportError: If learn2learn is missing.
        ValueError: If the folder cannot be used, or a class or split is too small.
    """

    def images(split: str) -> _Labelled:
        ways, samples = (
            (train_ways, train_samples) if split == "train" else (test_ways, test_samples)
        )
        data = load_folder(root, split, **{"least_images": samples, **options})
        if ways > (found := len(set(data.labels.tolist()))):
            raise ValueError(f"{ways} ways, but {split} of {root} has only {found} classes")
        return _Labelled(data)

    return _tasksets(images, (train_ways, train_samples), (test_ways, test_samples), num_tasks)


class _Labelled(Dataset[tuple[Tensor, int]]):
    """Images one by one, in [0, 1]."""

    def __init__(self, data: Images) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._data.images[index].float() / 255, int(self._data.labels[index])

    @property
    def indices_to_labels(self) -> dict[int, int]:
        """The labels, which learn2learn would otherwise find by reading every image."""
        return dict(enumerate(self._data.labels.tolist()))


def _tasksets(
    dataset_of: Callable[[str], Any],
    train: tuple[int, int],
    test: tuple[int, int],
    num_tasks: int,
) -> Tasksets:
    try:
        import learn2learn as l2l
    except ImportError as error:
        raise ImportError(f'{error}; tasksets need: pip install "l2l-prune[learn2learn]"') from None

    def taskset(split: str, ways: int, samples: int) -> Any:
        data = dataset_of(split)
        dataset = l2l.data.MetaDataset(
            data, indices_to_labels=getattr(data, "indices_to_labels", None)
        )
        transforms = [
            l2l.data.transforms.FusedNWaysKShots(dataset, n=ways, k=samples),
            l2l.data.transforms.LoadData(dataset),
            l2l.data.transforms.RemapLabels(dataset),
            l2l.data.transforms.ConsecutiveLabels(dataset),
        ]
        return l2l.data.Taskset(dataset, task_transforms=transforms, num_tasks=num_tasks)

    return Tasksets(taskset("train", *train), taskset("validation", *test), taskset("test", *test))
