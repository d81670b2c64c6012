"""Functions that users register on a step, as on torch's optimizers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


class Hooks(OrderedDict[int, Callable[..., Any]]):
    """Functions by the id of their handle, in the order in which they were registered."""

    def register(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Add a hook; the handle's ``remove()`` takes it off."""
        handle = RemovableHandle(self)
        self[handle.id] = hook
        return handle

    def call(self, *args: Any) -> None:
        """Call all hooks; a hook may remove itself meanwhile."""
        for hook in list(self.values()):
            hook(*args)
