"""MGAug: the meta-gradients of pruned sub-networks are added to that of the full network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from l2l_prune._basics import checks
from l2l_prune._basics.generators import check_generator, drawn_by
from l2l_prune.channels.groups import Channels, find_channels
from l2l_prune.masking.criteria import saliency
from l2l_prune.masking.masked_layer import plain_copy
from l2l_prune.masking.task_masks import TaskSeeds
from l2l_prune.masking.task_scores import uniform
from l2l_prune.masking.topk import kept_count, top_mask
from l2l_prune.pruner import Pruner

Way = Literal["width", "parameters", "catfish"]


class MGAug:
    """Runs each task in the full network and in pruned ones, and adds up the meta-gradients.

    The model stays dense. Per task, :meth:`networks` gives the masks of the full network and then
    of each sub-network; each runs the task, inner loop included, in a ``task_masks`` block::

        for task in tasks:
            for masks in mgaug.networks():
                with pruner.task_masks(masks):
                    learner = maml.clone()
                ...  # adapt, query loss
                loss.backward()

    With an outer optimizer the gradients add up in ``grad``, as published. With
    :class:`~l2l_prune.PrunedReptile`, collect each learner: the meta-update moves towards the mean
    over tasks and networks, which is the published direction with a step that does not grow with
    the number of networks.

    The first sub-network of a task loses the fraction ``rate``, the others fractions drawn
    uniformly from [0, ``rate``). What it loses is chosen by ``way``, layer by layer:

    * ``"width"``: the last channels, so that a narrower network of the leading ones remains, at
      least one in each layer. All layers that read these channels must be among the pruner's.
    * ``"parameters"``: random weights.
    * ``"catfish"``: the weights with the largest memorisation score ``|w * g|``, where ``g`` is the
      full network's meta-gradient of this task: by default what its run added to ``grad``. In
      loops that leave no ``grad``, give it to :meth:`observe`.

    Args:
        pruner: A :class:`~l2l_prune.Pruner` with a schedule that is dense throughout; it says which
            layers are pruned. ``reptile.pruner`` for Reptile.
        generator: Source of all randomness, on the CPU; ranks may share a seed.
        way: How sub-networks are chosen.
        rate: The largest fraction that a sub-network loses, in (0, 1).
        networks: Sub-networks for each task, >= 1.
        example_inputs: For ``"width"``: inputs of a forward pass of the model, by which its
            channels are found; a tensor, a tuple or list, or a dict.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, the schedule has sparse segments, a layer would
            lose everything, or the widths of the model cannot be reduced by masks.

    Examples:
        >>> from l2l_prune import Pruner, Schedule, Segment
        >>> net = torch.nn.Linear(4, 2)
        >>> pruner = Pruner(net, Schedule([Segment(1)]))
        >>> mgaug = MGAug(pruner, torch.Generator().manual_seed(0), rate=0.5, networks=2)
        >>> [int((~masks["weight"]).sum()) for masks in mgaug.networks()]
        [0, 4, 1]

    Source:
        Wang et al., *Improving Generalization in Meta-Learning via Meta-Gradient Augmentation*,
        IJCAI 2025 (arXiv 2306.08460), and the authors' program for catfish pruning, MAML and
        ProtoNet. That program rounds counts in another way, and its score takes the gradients of
        the tasks before into account as well. It has no random pruning: the two other ways are our
        reading (widths as in GradAug, arXiv 2006.07989). Its option to shrink the images of
        sub-networks is left out.
    """

    def __init__(
        self,
        pruner: Pruner,
        generator: torch.Generator,
        way: Way = "parameters",
        *,
        rate: float = 0.2,
        networks: int = 3,
        example_inputs: Any = None,
    ) -> None:
        self._pruner = checks.of_type("pruner", pruner, Pruner, "a Pruner")
        check_generator(generator)
        checks.one_of("way", way, get_args(Way))
        if any(segment.sparse for segment in pruner.schedule.segments):
            raise ValueError(
                "MGAug prunes sub-networks of a dense model: give the pruner a schedule without "
                "sparse segments"
            )
        if checks.fraction("rate", rate) == 0:
            raise ValueError("rate must be in (0, 1), got 0")
        self._way, self._rate = way, rate
        self._networks = checks.whole_number("networks", networks, least=1)
        self._channels: Channels | None = None
        if way == "width":
            if example_inputs is None:
                raise ValueError('way="width" needs example_inputs, by which channels are found')
            self._channels = _maskable_channels(pruner, example_inputs)
        else:
            for name, weight in pruner.weights.items():
                if kept_count(weight.numel(), rate) == 0:
                    raise ValueError(f"rate {rate} leaves no weight of {name}: lower it")
        self._seeds = TaskSeeds(generator, pruner.group)
        self._observed: list[Tensor | None] | None = None
        pruner.register_step_hook(self._end_iteration)

    def networks(self) -> Iterator[dict[str, Tensor]]:
        """Masks for each network that runs the next task, the full one first; ``True`` stays.

        Raises:
            RuntimeError: If catfish pruning finds no meta-gradient of the full network.
        """
        generator = self._seeds.begin(1.0)
        assert generator is not None  # all tasks take part
        weights = self._pruner.weights
        catfish, self._observed = self._way == "catfish", None
        before = {name: _gradient(w) for name, w in weights.items()} if catfish else {}
        yield {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        gradients = self._meta_gradients(before) if catfish else {}
        others = torch.rand(self._networks - 1, **drawn_by(generator), dtype=torch.float64)
        for rate in [self._rate, *(self._rate * others).tolist()]:
            if self._channels is not None:
                yield self._narrowed(self._channels, rate)
                continue
            scores = {
                name: -saliency(weight, gradients[name])
                if catfish
                else uniform(weight, generator).to(weight.device)
                for name, weight in weights.items()
            }
            yield {n: top_mask(s, kept_count(s.numel(), rate)) for n, s in scores.items()}

    def observe(self, gradients: Iterable[Tensor | None]) -> None:
        """Show catfish pruning this task's meta-gradient, that of the full network.

        Call it before the next network begins.

        Args:
            gradients: One for each of the model's parameters, in their order. In Reptile: old minus
                adapted weights, before the learner is collected.

        Raises:
            ValueError: If their number or shapes do not fit.
        """
        given, parameters = list(gradients), list(self._pruner.model.parameters())
        if len(given) != len(parameters) or any(
            g is not None and g.shape != p.shape for g, p in zip(given, parameters, strict=True)
        ):
            raise ValueError("observe() needs a gradient for each of the model's parameters")
        self._observed = [None if g is None else g.detach().clone() for g in given]

    def state_dict(self) -> dict[str, Any]:
        """The state of the random numbers, to save along with the Pruner's own."""
        return self._seeds.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If it is something else.
        """
        self._seeds.check_state(state)
        self._seeds.load_state_dict(state)

    def _end_iteration(self, pruner: Pruner) -> None:
        self._seeds.end_iteration()

    def _meta_gradients(self, before: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = self._pruner.weights
        if self._observed is None:
            found = {name: _gradient(w) - before[name] for name, w in weights.items()}
        else:
            shown = dict(zip(self._pruner.model.parameters(), self._observed, strict=True))
            gradients = {name: shown[w] for name, w in weights.items()}  # type: ignore[index]
            found = {
                n: torch.zeros_like(weights[n]) if g is None else g for n, g in gradients.items()
            }
        if self._observed is None and not any(bool(g.any()) for g in found.values()):
            raise RuntimeError(
                "catfish pruning has seen no meta-gradient of the full network: call backward() or "
                "observe(gradients) before the next network"
            )
        # Where a scaled loss overflowed, a gradient scaler throws this step away.
        return {name: g.nan_to_num(0.0, 0.0, 0.0) for name, g in found.items()}

    def _narrowed(self, channels: Channels, rate: float) -> dict[str, Tensor]:
        kept = torch.ones(channels.count + 1, dtype=torch.bool, device="cpu")  # the last is for -1
        for group in channels.groups:
            kept[group.first + max(1, kept_count(group.channels, rate)) : group.units.stop] = False
        masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self._pruner.weights.items()}
        for slot in channels.slots:
            if slot.axis.name in masks:
                mask = masks[slot.axis.name]
                stays = kept[slot.units].to(mask.device)
                others = [1] * (mask.dim() - slot.axis.dim - 1)
                mask &= stays.view(-1, *others)
        return masks


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()


def _maskable_channels(pruner: Pruner, example_inputs: Any) -> Channels:
    """The model's channels, if masks on what reads them make a narrower network.

    Raises:
        ValueError: If a layer that reads channels is not pruned, or no channel can go.
    """
    channels = find_channels(plain_copy(pruner.model), example_inputs)
    pruned = pruner.weights.keys()
    for slot in channels.slots:
        if slot.axis.role == "reads" and slot.axis.name not in pruned:
            raise ValueError(
                f'way="width" needs {slot.axis.name} among the pruned layers: it reads channels '
                "that narrower networks lack"
            )
    return channels
