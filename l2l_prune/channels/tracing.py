"""Which positions of a network's tensors must be removed together, found by a forward pass.

Every entry of every activation carries a label: the channel without which it would not be there.
Operations that only move entries (views, concatenation, shuffles, rolls) move their labels in the
same way; operations that join entries one by one merge their labels; convolutions and linear
layers read labels along their input channels and make new ones. What is normalised, summed or
attended to together gets one label, since taking a part of it away would change the rest. So
concatenation, depthwise and grouped convolution, channel shuffles and attention heads need no
rules of their own, and what is left to remove can be removed without changing anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_SAME = frozenset({"clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "copy"})
_VIEWS = frozenset({"view", "_unsafe_view", "_reshape_alias"})
_MOVES = _VIEWS | {
    "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "slice", "select", "split",
    "split_with_sizes", "unbind", "cat", "stack", "roll", "index_select", "repeat", "flip", "index",
}  # fmt: skip
_REDUCTIONS = frozenset({
    "mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod",
    "max", "min", "var_mean", "std_mean",
})  # fmt: skip
_TOGETHER = frozenset({"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum"})
_ENTRYWISE = frozenset({  # entrywise, but not marked so in all versions of torch
    "native_dropout", "bernoulli", "uniform", "normal", "fill", "zero", "hardswish", "hardtanh",
    "hardsigmoid", "softplus", "leaky_relu", "elu", "rrelu_with_noise", "log_sigmoid_forward",
    "_prelu_kernel",
})  # fmt: skip
_NEW = frozenset({"new_empty", "new_zeros", "new_ones", "new_full"})


@dataclass(frozen=True)
class Axis:
    """A dimension of a parameter or buffer along which channels lie.

    Attributes:
        path: The layer's name in the model.
        tensor: Name of its parameter or buffer.
        dim: The dimension.
        role: ``"reads"`` channels, ``"makes"`` or ``"carries"`` them.
    """

    path: str
    tensor: str
    dim: int
    role: str

    @property
    def name(self) -> str:
        """Full name of the tensor."""
        return f"{self.path}.{self.tensor}" if self.path else self.tensor


@dataclass
class Labels:
    """Labels of channels, some of which turn out to be the same; 0 marks what can never go.

    Attributes:
        axes: The labels along each axis, ``[size]``.
        attended: Labels that belong to an attention head.
    """

    axes: dict[Axis, Tensor] = field(default_factory=dict)
    attended: list[Tensor] = field(default_factory=list)
    _same: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long, device="cpu"))
    _fixed: list[tuple[Tensor, str, str]] = field(default_factory=list)
    _grids: list[Tensor] = field(default_factory=list)

    def along(self, axis: Axis, size: int) -> Tensor:
        """The labels along an axis, made on first use."""
        if axis not in self.axes:
            start = len(self._same)
            self.axes[axis] = torch.arange(start, start + size, device="cpu")
            self._same = torch.cat([self._same, self.axes[axis]])
        return self.axes[axis]

    def roots(self, labels: Tensor) -> Tensor:
        """One label in place of all that are the same."""
        return self._same[labels]

    def join(self, these: Tensor, those: Tensor) -> None:
        """Make labels in the same place the same, after broadcasting both to one shape."""
        one, other = (_compact(t) for t in _spread(these, those))
        one, other = (t.reshape(-1) for t in _spread(one, other))
        while True:
            first, second = self._same[one], self._same[other]
            apart = first != second
            if not bool(apart.any()):
                return
            first, second = first[apart], second[apart]
            low, high = torch.minimum(first, second), torch.maximum(first, second)
            self._same.scatter_reduce_(0, high, low, "amin")
            while not torch.equal(jumped := self._same[self._same], self._same):
                self._same = jumped

    def join_along(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Make labels along these dimensions the same; the result has size 1 along them."""
        for dim in dims:
            first = labels.narrow(dim, 0, 1)
            self.join(labels, first)
            labels = first
        return self.roots(labels)

    def varying(self, labels: Tensor) -> list[int]:
        """The dimensions along which labels differ."""
        roots = self.roots(_compact(labels))
        return [d for d in range(roots.dim()) if not torch.equal(*_ends(roots, d))]

    def fix(self, labels: Tensor, kind: str, why: str) -> None:
        """Record that these must stay, and why."""
        self._fixed.append((_compact(labels).reshape(-1), kind, why))

    def grid(self, labels: Tensor) -> None:
        """Record that code splits one dimension into several, which must stay rectangular."""
        self._grids.append(labels)

    def settle(self) -> dict[int, tuple[str, str]]:
        """Make all grids rectangular, and return which labels must stay and why.

        Where labels differ along several dimensions of a grid, they become the same along all but
        the last: the number of groups stays, and each group becomes smaller.
        """
        settled = False
        while not settled:
            settled = True
            for grid in self._grids:
                differing = self.varying(grid)
                if len(differing) > 1:
                    self.join_along(grid, differing[:-1])
                    settled = False
        fixed: dict[int, tuple[str, str]] = {}
        for labels, kind, why in self._fixed:
            for root in set(self.roots(labels).tolist()):
                fixed.setdefault(root, (kind, why))
        return fixed


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the labels through everything that runs under it (in inference mode).

    Args:
        model: A copy of the network that is made of inference tensors.
        labels: Where labels are kept; several runs may share them.
    """

    def __init__(self, model: nn.Module, labels: Labels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._labels = labels
        self._values: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the tensors, thus their id
        self._held: dict[int, tuple[str, str]] = {}
        self.used: set[int] = set()
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._held.setdefault(id(tensor), (path, name))

    def of(self, tensor: Any) -> Tensor | None:
        """The labels of a tensor; None if its size is fixed, or it is a number for all channels."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self._values:
            return self._values[id(tensor)][1]
        if id(tensor) not in self._held:
            return None
        self.used.add(id(tensor))
        long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if len(long) != 1:
            return None
        ids = self._axis(tensor, long[0], "carries")
        assert ids is not None
        return ids.view(tensor.shape)

    def _carried(self, tensor: Any) -> Tensor | None:
        """The labels of a layer's bias or the like, where one number belongs to one channel."""
        if id(tensor) in self._held and tensor.shape == (1,):
            return self._axis(tensor, 0, "carries")
        return self.of(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and give its results their labels."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        name = name[:-1] if name.endswith("_") else name
        rule = self._rule(name, func)
        if rule is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            rule = self._unknown
        out = func(*args, **kwargs)
        if rule in (self._linear, self._convolution, self._embedding) or any(
            self.of(t) is not None for t in _tensors(args, kwargs)
        ):
            rule(func, args, kwargs, out)
        return out

    def _rule(self, name: str, func: Any) -> Callable[[Any, Any, Any, Any], None] | None:
        named = {
            "linear": self._linear,
            "convolution": self._convolution,
            "embedding": self._embedding,
            "layer_norm": self._layer_norm,
            "native_layer_norm": self._layer_norm,
            "rms_norm": self._layer_norm,
            "group_norm": self._group_norm,
            "native_group_norm": self._group_norm,
            "constant_pad_nd": self._pad,
            "bmm": self._bmm,
            "glu": self._glu,
        }
        if name in named:
            return named[name]
        if "scaled_dot_product" in name:
            return self._attention
        if "batch_norm" in name:
            return self._batch_norm
        if name in _SAME | _ENTRYWISE or name.endswith("_like") or torch.Tag.pointwise in func.tags:
            return self._pointwise
        if name in _MOVES:
            return self._move
        if name in _REDUCTIONS or name in _TOGETHER:
            return self._reduce
        if name in _NEW:
            return self._new
        if name[-2:] in ("1d", "2d", "3d") and any(k in name for k in ("pool", "upsample", "pad")):
            return self._spatial
        if "max_pool" in name or "upsample" in name or "adaptive" in name:
            return self._spatial
        return None

    # ---- layers ------------------------------------------------------------------------------

    def _axis(self, tensor: Tensor, dim: int, role: str) -> Tensor | None:
        if id(tensor) not in self._held:
            return None
        self.used.add(id(tensor))
        return self._labels.along(Axis(*self._held[id(tensor)], dim, role), tensor.shape[dim])

    def _linear(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        x, weight, *bias = args
        self._layer(x, -1, weight, 0, 1, bias[0] if bias else kwargs.get("bias"), out)

    def _convolution(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        if groups == 1:
            self._layer(x, 1, weight, int(transposed), int(not transposed), bias, out)
            return
        rows, channels = self._axis(weight, 0, "makes"), self._channels(x, 1)
        if rows is None or channels is None:
            for labels in (rows, channels):
                if labels is not None:
                    self._labels.fix(labels, "input", "it reads the network's input in groups")
            return
        blocks = self._labels.join_along(channels.view(groups, -1), [1])
        self._labels.join(rows.view(groups, -1), blocks)
        each = out.shape[1] // groups
        made = rows if not transposed else blocks.expand(groups, each).reshape(-1)
        self._make(made, 1, bias, out)

    def _layer(
        self, x: Tensor, dim: int, weight: Tensor, makes: int, reads: int, bias: Any, out: Tensor
    ) -> None:
        channels = self._channels(x, dim)
        made, read = self._axis(weight, makes, "makes"), self._axis(weight, reads, "reads")
        if made is None or read is None:
            if channels is not None:
                self._labels.fix(channels, "refused", "the weight that reads it is computed")
            return
        if channels is None:
            self._labels.fix(read, "input", "it reads the network's input")
        else:
            self._labels.join(channels, read)
        self._make(made, dim, bias, out)

    def _make(self, made: Tensor, dim: int, bias: Any, out: Tensor) -> None:
        carried = self._carried(bias)
        if carried is not None:
            self._labels.join(carried, made)
        shape = [1] * out.dim()
        shape[dim] = -1
        self._set(out, made.view(shape))

    def _embedding(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        made = self._axis(args[0], 1, "makes")
        if made is not None:
            self._set(out, made)

    def _batch_norm(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        channels = self._channels(args[0], 1)
        if channels is None:
            return
        for tensor in args[1:5]:
            carried = self._carried(tensor)
            if carried is not None:
                self._labels.join(carried, channels)
        self._set(_first(out), self.of(args[0]))

    def _group_norm(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        channels = self._channels(args[0], 1)
        if channels is None:
            return
        native = "native" in func.overloadpacket.__name__
        groups, affine = (args[6], args[1:3]) if native else (args[1], args[2:4])
        blocks = self._labels.join_along(channels.view(groups, -1), [1])
        for tensor in affine:
            carried = self._carried(tensor)
            if carried is not None:
                self._labels.join(carried.view(groups, -1), blocks)
        self._together(channels)
        self._set(_first(out), self.of(args[0]))

    def _layer_norm(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        labels = self.of(args[0])
        if labels is None:
            return
        self._labels.join_along(labels, [-1 - d for d in range(len(args[1]))])
        self._together(labels)
        self._set(_first(out), labels)

    def _attention(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Heads ``[..., heads, tokens, length]``: each stays or goes as a whole."""
        found = [self.of(t) for t in args[:3]]
        heads = {t.shape[-3] for t in args[:3] if t.dim() > 3}
        known = [labels for labels in found if labels is not None]
        if len(known) < 3 or len(heads) != 1:
            for labels in known:
                self._labels.fix(labels, "whole", "attention joins it with others")
            return
        ends = [self._labels.join_along(labels, [-1, -2]) for labels in known]
        self._labels.join(ends[0], ends[1])
        self._labels.join(ends[0], ends[2])
        self._labels.attended.append(ends[0])
        self._set(_first(out), ends[0])

    def _bmm(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        left, right = self.of(args[0]), self.of(args[1])
        ends = []
        for labels, other, dim in ((left, right, 2), (right, left, 1)):
            if labels is None:
                continue
            if other is None and dim in self._labels.varying(labels):
                self._labels.fix(labels, "whole", "it is multiplied by a matrix of fixed size")
            ends.append(self._labels.join_along(labels, [dim]))
        if len(ends) == 2:
            self._labels.join(*ends)
            self._labels.attended.append(ends[0])
        self._set(out, ends[0])

    def _glu(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        """One half of the channels gates the other: they lose the same ones."""
        labels = self.of(args[0])
        assert labels is not None
        made, gates = labels.chunk(2, args[1] if len(args) > 1 else -1)
        self._labels.join(made, gates)
        self._set(out, made)

    # ---- operations --------------------------------------------------------------------------

    def _pointwise(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        out = _first(out)
        tensors = [t for t in _tensors(args, kwargs) if t.dim() <= out.dim()]
        known = [labels for t in tensors if (labels := self.of(t)) is not None]
        for labels in known[1:]:
            self._labels.join(known[0], labels)
        labels = _spread(*known)[0]
        differing = [dim - labels.dim() for dim in self._labels.varying(labels)]
        for tensor in tensors:
            if self.of(tensor) is None and any(
                tensor.dim() >= -dim and tensor.shape[dim] > 1 for dim in differing
            ):
                self._labels.fix(labels, "whole", "it is joined with a tensor of fixed size")
        self._set(out, labels)

    def _move(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func.overloadpacket.__name__ in _VIEWS:
            labels = self.of(args[0])
            assert labels is not None
            moved = self._labels.roots(labels).reshape(out.shape)
            for before, after in _blocks(labels.shape, out.shape):
                self._rectangular(labels, before)
                self._rectangular(moved, after)
            self._set(out, moved)
            return

        def labels_of(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or tensor.dtype in (torch.bool, torch.long):
                return tensor  # an index
            labels = self.of(tensor)
            return torch.zeros(tensor.shape, dtype=torch.long) if labels is None else labels

        moved = func(*tree_map(labels_of, args), **tree_map(labels_of, kwargs))
        if isinstance(out, Tensor):
            self._set(out, moved)
            return
        if func.overloadpacket.__name__.startswith("split") and len({o.shape for o in out}) == 1:
            self._labels.grid(torch.stack([self._canonical(m) for m in moved]))
        for each, labels in zip(out, moved, strict=True):
            self._set(each, labels)

    def _reduce(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        labels, outs = self.of(args[0]), [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if labels is None:
            return
        name = func.overloadpacket.__name__
        given = kwargs.get("dim", args[2 if "norm" in name else 1] if len(args) > 1 else None)
        dims = given if isinstance(given, (list, tuple)) and given else [given]
        everywhere = dims[0] is None
        dims = [d % labels.dim() for d in (range(labels.dim()) if everywhere else dims)]
        differing = set(self._labels.varying(labels))
        ends = self._labels.join_along(labels, dims)
        if differing & set(dims):
            self._together(labels)
        for each in outs:
            if name in _TOGETHER:
                self._set(each, labels)
            else:
                kept = each.dim() == labels.dim()
                shape = [n for d, n in enumerate(ends.shape) if kept or d not in dims]
                self._set(each, ends.reshape(shape))

    def _spatial(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        labels, out = self.of(args[0]), _first(out)
        if labels is None:
            return
        moved = list(range(2 if labels.dim() > 2 else 1, labels.dim()))
        across = set(moved) & set(self._labels.varying(labels))
        ends = self._labels.join_along(labels, moved)
        if across:  # as in local response normalisation
            self._together(labels)
        self._set(out, ends)

    def _pad(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        labels = self.of(args[0])
        if labels is None:
            return
        padded = [d for d in range(out.dim()) if out.shape[d] != labels.shape[d]]
        differing = self._labels.varying(labels)
        if set(padded) & set(differing):
            moved = func(labels, args[1], 0)
        else:
            moved = labels
            for dim in padded:
                moved = moved.narrow(dim, 0, 1)
        self._set(out, moved)

    def _new(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        labels = self.of(args[0])
        if labels is None or labels.dim() != out.dim():
            return
        for dim, size in enumerate(out.shape):
            if size != labels.shape[dim] and size != 1:
                return
            labels = labels.narrow(dim, 0, size)
        self._set(out, labels)

    def _unknown(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for tensor in _tensors(args, kwargs):
            labels = self.of(tensor)
            if labels is not None:
                why = f"its channels pass through {func.overloadpacket}, which is unknown here"
                self._labels.fix(labels, "refused", why)

    # ---- helpers -----------------------------------------------------------------------------

    def _channels(self, x: Tensor, dim: int) -> Tensor | None:
        """Labels along one dimension, ``[size]``; other dimensions must not differ."""
        labels = self.of(x)
        if labels is None:
            return None
        dim %= labels.dim()
        others = [d for d in self._labels.varying(labels) if d != dim]
        rest = self._labels.join_along(labels, others)
        for other in range(labels.dim()):
            if other != dim:
                rest = rest.narrow(other, 0, 1)
        return rest.reshape(-1)

    def _together(self, labels: Tensor) -> None:
        if not self._labels.varying(labels):
            self._labels.fix(labels, "whole", "its channels are normalised or summed together")

    def _rectangular(self, labels: Tensor, dims: Sequence[int]) -> None:
        if len(set(dims) & set(self._labels.varying(labels))) > 1:
            others = [d for d in range(labels.dim()) if d not in dims]
            for dim in others:
                labels = labels.narrow(dim, 0, 1)
            self._labels.grid(self._labels.roots(labels))

    def _canonical(self, labels: Tensor) -> Tensor:
        """The same labels, expanded along dimensions in which nothing differs."""
        shape, labels = labels.shape, self._labels.roots(_compact(labels))
        for dim in range(labels.dim()):
            if torch.equal(*_ends(labels, dim)):
                labels = labels.narrow(dim, 0, 1)
        return labels.expand(shape)

    def _set(self, tensor: Tensor, labels: Tensor | None) -> None:
        if labels is not None and bool(_compact(labels).any()):
            self._values[id(tensor)] = (tensor, self._canonical(labels).expand(tensor.shape))


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


def _spread(*labels: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.broadcast_tensors(*labels))  # type: ignore[no-untyped-call]


def _first(out: Any) -> Tensor:
    tensor = out if isinstance(out, Tensor) else out[0]
    assert isinstance(tensor, Tensor)
    return tensor


def _compact(labels: Tensor) -> Tensor:
    """Give expanded dimensions size 1."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _ends(labels: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return labels, labels.narrow(dim, 0, 1).expand(labels.shape)


def _blocks(before: torch.Size, after: torch.Size) -> Iterator[tuple[list[int], list[int]]]:
    """Dimensions before and after a view that hold the same entries."""
    i = j = 0
    while i < len(before) or j < len(after):
        mine, theirs = [i] if i < len(before) else [], [j] if j < len(after) else []
        sizes = [before[i] if mine else 1, after[j] if theirs else 1]
        i, j = i + len(mine), j + len(theirs)
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0], mine, i = sizes[0] * before[i], [*mine, i], i + 1
            else:
                sizes[1], theirs, j = sizes[1] * after[j], [*theirs, j], j + 1
        yield mine, theirs
