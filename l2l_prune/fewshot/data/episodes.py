"""Few-shot tasks from images in memory, drawn without a loop over examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune._basics.generators import drawn_by, restore


class Episode(NamedTuple):
    """One few-shot task.

    Attributes:
        support_x: float32 ``[ways * shots, C, H, W]``.
        support_y: int64 ``[ways * shots]``, in 0 .. ways - 1 (targets in regression).
        query_x: float32 ``[ways * queries, C, H, W]``.
        query_y: int64 ``[ways * queries]``.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


class EpisodeSampler:
    """Draws episodes: classes, and examples of each class, without replacement.

    Args:
        images: ``[n, C, H, W]``; uint8 images are scaled to [0, 1] after the draw.
        labels: Class of each image ``[n]``, any integers.
        ways: Classes in a task, >= 1.
        shots: Support examples of each class, >= 1.
        queries: Query examples of each class, >= 0; never support examples.
        label_noise: Probability, in [0, 1), that an example's label is replaced by another class of
            its task, chosen uniformly.
        seed: Seed of the draws, >= 0.
        generator: Source of the draws, instead of a new one with ``seed``.

    Raises:
        TypeError: If images are not a tensor, labels not a tensor of integers, or a number is not
            an integer.
        ValueError: If a number is out of range, lengths differ, or a class is too small.

    Examples:
        >>> sampler = EpisodeSampler(
        ...     torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]), ways=2, shots=1, queries=1
        ... )
        >>> sampler.sample().query_y.tolist()
        [0, 1]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        ways: int,
        shots: int,
        queries: int,
        label_noise: float = 0.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, given in (("images", images), ("labels", labels)):
            checks.of_type(name, given, Tensor, "a tensor")
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.dim() != 1:
            raise ValueError(f"labels must have one dimension, got {list(labels.shape)}")
        if len(images) != len(labels):
            raise ValueError(
                f"there must be as many labels as images, got {len(labels)} and {len(images)}"
            )
        for name, value, least in (("ways", ways, 1), ("shots", shots, 1), ("queries", queries, 0)):
            checks.whole_number(name, value, least)
        checks.whole_number("seed", seed)
        self._label_noise = checks.fraction("label_noise", label_noise)
        if self._label_noise and ways < 2:
            raise ValueError("label_noise needs at least one other class: set ways >= 2")
        classes, sizes = torch.unique(labels, return_counts=True)
        if ways > len(classes):
            raise ValueError(f"ways={ways}, but there are only {len(classes)} classes")
        smallest = int(sizes.argmin())
        if shots + queries > int(sizes[smallest]):
            raise ValueError(
                f"shots + queries = {shots + queries}, but class {int(classes[smallest])} has only "
                f"{int(sizes[smallest])} examples"
            )
        self._images, labels = images, labels.cpu()  # where episodes are drawn
        sizes = sizes.cpu()
        self.ways, self.shots, self.queries = ways, shots, queries
        self._sizes = sizes
        self._first = sizes.cumsum(0) - sizes  # of each class in the order below
        self._order = labels.argsort(stable=True)
        if generator is None:
            generator = torch.Generator().manual_seed(seed)
        self._generator = checks.of_type(
            "generator", generator, torch.Generator, "a torch.Generator"
        )

    def sample(self) -> Episode:
        """Draw one episode."""
        drawn = drawn_by(self._generator)
        classes = torch.randperm(len(self._sizes), **drawn)[: self.ways].cpu()
        # The smallest random keys choose examples without replacement, in all classes at once.
        keys = torch.rand(self.ways, int(self._sizes.max()), **drawn).cpu()
        keys[torch.arange(keys.shape[1], device="cpu") >= self._sizes[classes][:, None]] = 2.0
        members = keys.argsort(dim=1)[:, : self.shots + self.queries]
        chosen = self._order[self._first[classes][:, None] + members]
        support, query = chosen[:, : self.shots], chosen[:, self.shots :]
        labels = torch.arange(self.ways, device="cpu")
        return Episode(
            self._gather(support),
            self._mistaken(labels.repeat_interleave(self.shots)),
            self._gather(query),
            self._mistaken(labels.repeat_interleave(self.queries)),
        )

    def __iter__(self) -> Iterator[Episode]:
        while True:
            yield self.sample()

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream of draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the draws from where :meth:`state_dict` was taken.

        Raises:
            ValueError: If ``state`` is not such a state.
        """
        restore(self._generator, state, "an EpisodeSampler")

    def _mistaken(self, labels: Tensor) -> Tensor:
        if self._label_noise:
            drawn = drawn_by(self._generator)
            wrong = torch.rand(len(labels), **drawn).cpu() < self._label_noise
            others = torch.randint(1, self.ways, (len(labels),), **drawn).cpu()
            labels = torch.where(wrong, (labels + others) % self.ways, labels)
        return labels.to(self._images.device)

    def _gather(self, indices: Tensor) -> Tensor:
        images = self._images[indices.flatten().to(self._images.device)]
        return images.float().div_(255) if images.dtype == torch.uint8 else images.float()
