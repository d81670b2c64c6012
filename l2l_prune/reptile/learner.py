"""A task's own copy of the model in Reptile."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l2l_prune.reptile.inner_loop import Workspace


class Learner(nn.Module):
    """A task's own copy of the model; made by :meth:`~l2l_prune.PrunedReptile.clone`.

    Attributes:
        module: A plain copy of the model; while sparse its pruned weights are exactly 0 after
            every :meth:`adapt` and before every forward.
    """

    def __init__(self, reptile: nn.Module, iteration: int, workspace: Workspace) -> None:
        super().__init__()
        self.module = workspace.module
        self.training = workspace.module.training
        # In __dict__, so that the meta-model does not become a submodule of each learner.
        self.__dict__.update(_reptile=reptile, _workspace=workspace, _born=iteration)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the learner's model under the mask.

        Raises:
            RuntimeError: If the learner was collected.
        """
        self.workspace.project()
        return self.module(*args, **kwargs)

    def adapt(self, loss: Tensor) -> None:
        """One inner step of the inner optimizer on ``loss``.

        Args:
            loss: Scalar that depends on this learner's parameters.

        Raises:
            RuntimeError: If the learner was collected, or ``loss`` does not depend on it.
            TypeError: If ``loss`` is no tensor.
            ValueError: If ``loss`` holds several numbers.
        """
        self.workspace.adapt(loss)

    def release(self, reptile: nn.Module, iteration: int) -> Workspace:
        """Give the working copy back (called by :meth:`~l2l_prune.PrunedReptile.collect`)."""
        workspace = self.workspace
        if self.__dict__["_reptile"] is not reptile:
            raise RuntimeError("this learner was cloned from another PrunedReptile")
        if self.__dict__["_born"] != iteration:
            raise RuntimeError("this learner was cloned before the last step(): its start is stale")
        workspace.project()
        self.__dict__["_workspace"] = None
        del self.module
        return workspace

    @property
    def workspace(self) -> Workspace:
        """The working copy behind the learner, with its optimizer, masks and weights.

        Raises:
            RuntimeError: If the learner was collected.
        """
        workspace: Workspace | None = self.__dict__["_workspace"]
        if workspace is None:
            raise RuntimeError("this learner was collected: clone() a new one")
        return workspace
