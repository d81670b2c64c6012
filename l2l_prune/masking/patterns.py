"""Where pruned weights may lie: anywhere, N of every M, or in whole blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune._basics.precision import widened
from l2l_prune.masking.topk import check_finite, kept_count, top_mask


class Pattern(ABC):
    """A rule for where pruned weights may lie.

    Tensors come as ``[outputs, inputs / groups, ...]``, also those of transposed convolutions.
    """

    @abstractmethod
    def count(self, shape: torch.Size, keep: int) -> int:
        """How many weights the pattern keeps if ``keep`` are asked for.

        Raises:
            ValueError: If the pattern does not fit a tensor of this shape, or not this count.
        """

    @abstractmethod
    def mask(self, scores: Tensor, keep: int) -> Tensor:
        """Boolean mask with ``count(scores.shape, keep)`` True entries.

        Args:
            scores: Real tensor; large ones stay, and among equal ones the first.
            keep: Number of weights to keep.

        Raises:
            ValueError: If ``scores`` holds NaN or infinity.
        """


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Each weight by itself: the paper's masks."""

    def count(self, shape: torch.Size, keep: int) -> int:
        """``keep``."""
        return keep

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        """The largest scores of the tensor."""
        return top_mask(scores, keep)


@dataclass(frozen=True)
class NByM(Pattern):
    """Keep ``n`` of every ``m`` neighbours along the inputs, as sparse tensor cores require.

    The input dimension is the second: columns of a linear layer, input channels of a convolution
    (at each kernel position, as NVIDIA's ASP does). A transposed convolution, which holds its
    inputs first, is also pruned along its inputs. The schedule's sparsity must be ``1 - n / m``.

    Args:
        n: Weights that stay in each group, 1 .. ``m - 1``.
        m: Neighbours in a group, >= 2.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021 (2:4).

    Examples:
        >>> NByM(2, 4).mask(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2).tolist()
        [[True, False, True, False]]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        checks.whole_number("m", self.m, least=2)
        if checks.whole_number("n", self.n, least=1) >= self.m:
            raise ValueError(f"n must be below m = {self.m}, got {self.n}")

    @property
    def sparsity(self) -> float:
        """The only one that the pattern has: ``1 - n / m``."""
        return 1 - self.n / self.m

    def count(self, shape: torch.Size, keep: int) -> int:
        """``keep``, if it is ``n / m`` of the tensor."""
        if len(shape) < 2 or shape[1] % self.m:
            inputs = shape[1] if len(shape) > 1 else "no"
            raise ValueError(f"it has {inputs} inputs, which do not divide into groups of {self.m}")
        total = shape.numel()
        if keep * self.m != total * self.n:
            raise ValueError(
                f"{self.n}:{self.m} keeps {self.n} of {self.m}, so the sparsity must be "
                f"{self.sparsity:g}, but it was to keep {keep} of {total} weights"
            )
        return keep

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        """The ``n`` largest of each group."""
        check_finite(scores)
        by_input = scores.detach().movedim(1, -1)
        groups = by_input.reshape(-1, self.m)
        kept = groups.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
        mask.scatter_(1, kept, True)
        return mask.view(by_input.shape).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class Block(Pattern):
    """Whole blocks of the matrix ``[outputs, inputs x kernel]`` stay or go.

    For a transposed convolution, which holds its inputs first, the matrix is the same.

    A block's score is the sum of its weights' scores. The number of blocks that stay is rounded
    like the number of weights in :class:`Unstructured`.

    Args:
        rows: Height of a block, along the outputs, >= 1.
        columns: Width of a block, along inputs and kernel positions, >= 1.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Narang et al., *Block-Sparse Recurrent Neural Networks*, 2017.

    Examples:
        >>> Block(1, 2).mask(torch.tensor([[3.0, 1.0, 2.0, 0.5]]), 2).tolist()
        [[True, True, False, False]]
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        checks.whole_number("rows", self.rows, least=1)
        checks.whole_number("columns", self.columns, least=1)

    def count(self, shape: torch.Size, keep: int) -> int:
        """The weights of the nearest number of blocks."""
        matrix = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())
        if matrix[0] % self.rows or matrix[1] % self.columns:
            raise ValueError(
                f"its matrix of {matrix[0]} x {matrix[1]} does not divide into blocks of "
                f"{self.rows} x {self.columns}"
            )
        size = self.rows * self.columns
        return size * kept_count(shape.numel() // size, 1 - keep / shape.numel())

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        """The blocks with the largest sums."""
        matrix = scores.detach().reshape(scores.shape[0] if scores.dim() > 1 else 1, -1)
        height, width = matrix.shape
        rows, columns = height // self.rows, width // self.columns
        blocks = matrix.view(rows, self.rows, columns, self.columns)
        size = self.rows * self.columns
        kept = top_mask(widened(blocks).sum(dim=(1, 3)), self.count(scores.shape, keep) // size)
        spread = kept[:, None, :, None].expand(rows, self.rows, columns, self.columns)
        return spread.reshape(scores.shape)


@dataclass(frozen=True)
class Rows(Pattern):
    """Whole output channels (or neurons) stay or go, with all their weights.

    A channel's score is the sum of its weights' scores. The tensor keeps its shape; for a network
    that is physically smaller, use :class:`~l2l_prune.ChannelPruner`.

    Examples:
        >>> Rows().mask(torch.tensor([[3.0, 1.0], [2.0, 0.5]]), 2).tolist()
        [[True, True], [False, False]]
    """

    def count(self, shape: torch.Size, keep: int) -> int:
        """The weights of the nearest number of channels."""
        return Block(1, shape[1:].numel()).count(shape, keep)

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        """The channels with the largest sums."""
        return Block(1, scores.shape[1:].numel()).mask(scores, keep)


UNSTRUCTURED = Unstructured()


def read_pattern(text: str) -> Pattern:
    """Read a pattern as settings write it.

    Args:
        text: ``"N:M"``, ``"ROWSxCOLUMNS"`` (blocks) or ``"rows"``.

    Raises:
        TypeError: If it is no string.
        ValueError: If it has another form, or a number is out of range.

    Examples:
        >>> read_pattern("2:4"), read_pattern("4x1"), read_pattern("rows")
        (NByM(n=2, m=4), Block(rows=4, columns=1), Rows())
    """
    if checks.of_type("pattern", text, str, "a string") == "rows":
        return Rows()
    for sign, kind in ((":", NByM), ("x", Block)):
        first, found, second = text.partition(sign)
        if found and first.isdecimal() and second.isdecimal():
            return kind(int(first), int(second))
    raise ValueError(
        f"pattern must be N:M such as 2:4, ROWSxCOLUMNS such as 4x1 for blocks, or rows, got "
        f"{text!r}"
    )
