"""How a run's masks are chosen: criterion, allocation, rewinding and regrowth, with their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.streams import stream
from l2l_prune.masking import criteria
from l2l_prune.masking.criteria import Criterion, Movement
from l2l_prune.masking.patterns import UNSTRUCTURED, read_pattern
from l2l_prune.masking.task_masks import TaskMasks
from l2l_prune.methods.regrowth import Regrowth
from l2l_prune.methods.rewinding import Rewind
from l2l_prune.pruner import Pruner
from l2l_prune.reptile.reptile import PrunedReptile


class Masks:
    """What a run's settings ask of its Pruner, and what must be saved along with it.

    Args:
        config: The settings.
        model: What will be pruned, before it is.
        loss: The (meta-)loss on the tasks of the current meta-iteration.
    """

    def __init__(self, config: RunConfig, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self._config, self._loss = config, loss
        pattern = UNSTRUCTURED if config.pattern is None else read_pattern(config.pattern)
        per_task = any(segment.per_task for segment in config.schedule.segments)
        self._generators = {
            purpose: stream(config.seed, purpose) for purpose in ("criterion", "regrowth")
        }
        self._movement: Movement | None = None
        self._stateful: dict[str, Any] = {}
        self.options: dict[str, Any] = {
            "layers": config.layers,
            "criterion": self._criterion(model),
            "pattern": pattern,
            "allocation": config.allocation,
            "skip": self._skipped(model),
            "task_masks": (  # whose state is the Pruner's
                TaskMasks(stream(config.seed, "task masks"), pattern=pattern) if per_task else None
            ),
        }

    def follow(self, trainer: Pruner | PrunedReptile, steps: Optimizer | PrunedReptile) -> None:
        """Register hooks on the trainer that was made with :attr:`options`.

        Args:
            trainer: The Pruner or PrunedReptile.
            steps: The object that takes the outer steps.
        """
        config = self._config
        if self._movement is not None:
            steps.register_step_pre_hook(self._movement.observe)
            self._stateful["movement"] = self._movement
        if config.rewind is not None:
            self._stateful["rewind"] = Rewind(trainer, to=config.rewind)
        if config.regrow is not None:
            pruner = trainer.pruner if isinstance(trainer, PrunedReptile) else trainer
            assert isinstance(pruner, Pruner)
            self._stateful["regrowth"] = Regrowth(
                pruner,
                interval=max(1, config.schedule.iterations // 40),
                loss=self._loss if config.regrow == "gradient" else None,
                generator=self._generators["regrowth"],
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        state = {name: held.state_dict() for name, held in self._stateful.items()}
        return {**state, "generators": {k: g.get_state() for k, g in self._generators.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for name, held in self._stateful.items():
            held.load_state_dict(state[name])
        for purpose, generator in self._generators.items():
            generator.set_state(state["generators"][purpose])

    def _skipped(self, model: nn.Module) -> list[str]:
        heads = [name for name, _ in model.named_modules() if name.split(".")[-1] == "classifier"]
        # Narrower sub-networks take inputs from the classifier, which is not pruned itself.
        return [] if self._config.prune_head or self._config.mgaug == "width" else heads

    def _criterion(self, model: nn.Module) -> Criterion:
        name, parameters = self._config.criterion, list(model.parameters())
        if name == "movement":
            self._movement = Movement(parameters)
            return self._movement
        return {
            "magnitude": criteria.magnitude,
            "random": criteria.random(self._generators["criterion"]),
            "snip": criteria.snip,
            "taylor": criteria.taylor,
            "grasp": criteria.grasp(self._loss, parameters),
        }[name]
