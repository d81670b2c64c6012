"""The masks that a Pruner holds on its tensors: set, opened, and guarded against changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from l2l_prune.masking import masked_layer
from l2l_prune.masking.prunable import LayerTensor


class HeldMasks:
    """The masks of all pruned tensors: all ones until others are :meth:`set`."""

    def __init__(
        self, model: nn.Module, tensors: Sequence[LayerTensor], *, dense_keys: bool
    ) -> None:
        for tensor in tensors:
            masked_layer.attach(tensor.module, tensor.name, dense_keys=dense_keys)
        self._model, self._tensors = model, tensors
        self._values: list[Tensor] = []
        self._seen: list[tuple[Tensor, int]] = []  # buffers as last checked, with their versions

    @property
    def values(self) -> list[Tensor]:
        """The boolean mask of each tensor, as it was set, where its weight is; True stays."""
        pairs = zip(self._values, self.originals(), strict=False)  # none before the first set()
        self._values = [m if weight is None else m.to(weight.device) for m, weight in pairs]
        return self._values

    def originals(self) -> list[Tensor]:
        """The stored parameter of each tensor: ``weight_orig``, or ``weight`` without a mask."""
        return [masked_layer.stored_tensor(t.module, t.name) for t in self._tensors]

    def set(self, masks: list[Tensor]) -> None:
        """Put other masks in place; the weights that they prune become 0."""
        for tensor, mask in zip(self._tensors, masks, strict=True):
            masked_layer.set_mask(tensor.module, tensor.name, mask)
        self._values = masks
        self._remember_buffers()

    def project(self, *, nan_too: bool = False) -> None:
        """Set the pruned weights to exactly 0; with ``nan_too``, which is slower, also NaN."""
        held = [masked_layer.held_tensors(t.module, t.name) for t in self._tensors]
        if nan_too:
            for original, mask in held:
                original.masked_fill_(mask == 0, 0)
        else:
            torch._foreach_mul_([original for original, _ in held], [mask for _, mask in held])

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within the block, gradients reach the pruned entries, which stay 0."""
        mine = [t for t in self._tensors if masked_layer.open_mask(t.module, t.name)]
        try:
            yield
        finally:
            for tensor in mine:
                masked_layer.close_mask(tensor.module, tensor.name)

    def take_off(self) -> None:
        """Make the modules plain again; pruned weights keep the value 0.

        Raises:
            RuntimeError: If other code wrapped the class of a module; nothing is changed then.
        """
        for tensor in self._tensors:
            if not masked_layer.can_detach(tensor.module, tensor.name):
                raise RuntimeError(
                    f"the mask of {tensor.full_name} cannot be taken off: other code has changed "
                    "the class of its module since (a parametrization?); undo that first"
                )
        for tensor in self._tensors:
            masked_layer.detach(tensor.module, tensor.name)

    def check_there(self) -> None:
        """Raise a RuntimeError that names the tensor if its module, mask or own weight is gone."""
        here = {id(module) for module in self._model.modules()}
        for tensor in self._tensors:
            if id(tensor.module) not in here:
                raise RuntimeError(
                    f"the module of {tensor.full_name} was replaced after the Pruner was attached, "
                    "so that the new one is not pruned: finalize the Pruner before you replace "
                    "modules, and make a new one"
                )
            if tensor.name not in masked_layer.held_names(tensor.module):
                raise RuntimeError(
                    f"the mask of {tensor.full_name} was removed by other code "
                    "(prune.remove?); use Pruner.finalize() to take masks off"
                )
            original = tensor.module._parameters[f"{tensor.name}_orig"]
            if original is not None and not original.is_leaf:
                raise RuntimeError(
                    f"{tensor.full_name} is a task's adapted weight, from an inner loop that has "
                    "not ended: put the model's own weights back first "
                    "(torchopt.recover_state_dict, or leave higher's context)"
                )

    def check_same(self, iteration: int, *, thoroughly: bool = False) -> None:
        """Raise a RuntimeError that names the tensor if the model holds another mask.

        Masks in the model may be moved, cast or reloaded, but must prune the same entries. With
        ``thoroughly``, even buffers that show no sign of a write are compared: DDP's broadcasts
        leave none. ``iteration`` is for the message.
        """
        values = self.values
        for position, tensor in enumerate(self._tensors):
            buffer = _buffer(tensor)
            seen, version = self._seen[position]
            if not thoroughly and buffer is seen and buffer._version == version:
                continue
            if not torch.equal(buffer.bool(), values[position]):
                raise RuntimeError(
                    f"the mask of {tensor.full_name} is not the one of this Pruner at iteration "
                    f"{iteration}: load Pruner.state_dict() together with the model's, and "
                    "under DistributedDataParallel give Pruner its group="
                )
        self._remember_buffers()

    def _remember_buffers(self) -> None:
        buffers = [_buffer(tensor) for tensor in self._tensors]
        self._seen = [(buffer, buffer._version) for buffer in buffers]


def _buffer(tensor: LayerTensor) -> Tensor:
    """The tensor's mask as the model holds it, whoever wrote it."""
    buffer = tensor.module._buffers[f"{tensor.name}_mask"]
    assert buffer is not None
    return buffer
