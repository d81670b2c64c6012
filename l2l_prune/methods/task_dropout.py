"""Dropout whose mask is held for the whole task, beside ordinary dropout as a control."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2l_prune._basics import checks
from l2l_prune._basics.generators import check_generator, drawn_by


class TaskDropout(nn.Dropout):
    """Drops the same units in all examples and steps of a task.

    A dropped unit is 0, the others are scaled by ``1 / (1 - p)``. :meth:`draw` begins a task: call
    it on the learner, or on the model just before it is cloned. The mask depends only on what
    ``draw`` stores and on the shape of an example, so that any number of learners may live at once.
    A learner of :class:`~l2l_prune.PrunedReptile` that was cloned anew has no mask until then.
    In evaluation mode nothing is dropped. Masks are drawn on the CPU, so that all devices get the
    same ones; on a GPU each forward pass in training waits for it.

    A layer that one forward pass calls several times drops the same units each time: register one
    for each place.

    Compiled steps would compile anew for each task, and learners that are adapted together
    (:class:`~l2l_prune.reptile.batched.BatchedLearners`) cannot have masks of their own: torch
    raises an error.

    Args:
        p: Probability that a unit is dropped, in [0, 1).
        channels: Drop whole channels (the first axis of an example) instead of single units.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``p`` is out of range.

    Examples:
        >>> dropout = TaskDropout(0.5)
        >>> TaskDropout.draw(dropout, torch.Generator().manual_seed(0))
        >>> out = dropout(torch.ones(3, 100))
        >>> bool((out[0] == out[1]).all() and (out == dropout(torch.ones(3, 100))).all())
        True
    """

    seed: Tensor

    def __init__(self, p: float = 0.5, channels: bool = False) -> None:
        super().__init__(checks.fraction("p", p))
        self.channels = checks.true_or_false("channels", channels)
        # A buffer, so that clones get it; not saved, since a task does not outlive a checkpoint.
        self.register_buffer("seed", torch.tensor(-1), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Drop this task's units of a batch of examples.

        Raises:
            RuntimeError: In training mode, if no task has begun.
        """
        if not self.training or self.p == 0:
            return input
        seed = int(self.seed)
        if seed < 0:
            raise RuntimeError(
                "dropout for a task needs its mask: call TaskDropout.draw(learner, generator) at "
                "the start of each task"
            )
        shape = input.shape[1:]
        if self.channels:
            shape = torch.Size([shape[0], *(1 for _ in shape[1:])])
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(shape, **drawn_by(generator)) >= self.p
        return input * (kept / (1 - self.p)).to(input)

    @staticmethod
    def draw(model: nn.Module, generator: torch.Generator) -> None:
        """Begin a task: give each layer of this class in ``model`` a new mask.

        Args:
            model: A learner, or a model that is about to be cloned.
            generator: Source of the masks, on the CPU; save its state to resume exactly.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the model has no such layer.
        """
        layers = [m for m in model.modules() if isinstance(m, TaskDropout)]
        if not layers:
            raise ValueError("the model has no TaskDropout: call TaskDropout.replace_in(model)")
        check_generator(generator)
        for layer in layers:
            seed = int(torch.randint(2**62, (), **drawn_by(generator)))
            layer.seed = layer.seed.clone().fill_(seed)  # learn2learn's clones share the old one

    @staticmethod
    def replace_in(model: nn.Module) -> None:
        """Replace each ``nn.Dropout`` (and ``Dropout1d`` to ``3d``, by channels) in ``model``.

        Raises:
            ValueError: If the model has none below its top.
        """
        kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
        found = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()  # a layer may be used in several places
            if child is not None and type(child) in kinds
        ]
        if not found:
            raise ValueError("the model has no dropout layer to replace")
        for parent, name, child in found:
            held = TaskDropout(child.p, channels=type(child) is not nn.Dropout)  # type: ignore[arg-type]
            setattr(parent, name, held.train(child.training))
