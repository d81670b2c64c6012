"""Glyphs as learn2learn tasksets, so that a learn2learn loop takes them like its benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

from l2l_prune.fewshot.data.glyphs import Glyphs


class GlyphsTasksets(NamedTuple):
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
) -> GlyphsTasksets:
    """Tasksets made as ``learn2learn.vision.benchmarks.get_tasksets`` makes its own.

    Args:
        train_ways: Classes of a training task.
        train_samples: Examples of each class in a training task (support and query together).
        test_ways: Classes of a validation or test task.
        test_samples: Examples of each class in a validation or test task.
        num_tasks: Number of tasks in a taskset; -1 for a fresh one at each draw.
        max_classes: Number of training characters, all by default.
        **options: Further arguments of :class:`Glyphs`, but not ``split``.

    Returns:
        ``learn2learn.data.Taskset`` for train, validation and test; a draw gives
        ``(images [ways * samples, 1, 28, 28], labels [ways * samples])``.

    Raises:
        ImportError: If learn2learn is missing.
    """
    try:
        import learn2learn as l2l
    except ImportError as error:
        raise ImportError(f'{error}; tasksets need: pip install "l2l-prune[learn2learn]"') from None

    def taskset(split: str, ways: int, samples: int) -> Any:
        limit = max_classes if split == "train" else None
        dataset = l2l.data.MetaDataset(Glyphs(split, max_classes=limit, **options))
        transforms = [
            l2l.data.transforms.FusedNWaysKShots(dataset, n=ways, k=samples),
            l2l.data.transforms.LoadData(dataset),
            l2l.data.transforms.RemapLabels(dataset),
            l2l.data.transforms.ConsecutiveLabels(dataset),
        ]
        return l2l.data.Taskset(dataset, task_transforms=transforms, num_tasks=num_tasks)

    return GlyphsTasksets(
        train=taskset("train", train_ways, train_samples),
        validation=taskset("validation", test_ways, test_samples),
        test=taskset("test", test_ways, test_samples),
    )
