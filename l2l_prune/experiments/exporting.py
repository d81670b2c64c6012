"""From finished runs to a device: exports, and what adapting costs there."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from l2l_prune._basics.files import replace_file
from l2l_prune.experiments.config import RunConfig
from l2l_prune.experiments.defaults import LEARN_MORE
from l2l_prune.experiments.report.adaptation import write_adaptation
from l2l_prune.experiments.report.finished_runs import FinishedRun, read_folder
from l2l_prune.experiments.report.results import read_result
from l2l_prune.experiments.restoring import restored_network, restored_reptile
from l2l_prune.experiments.running.run import evaluation_tasks, load_split
from l2l_prune.experiments.streams import stream
from l2l_prune.fewshot.data import Images, load_images
from l2l_prune.fewshot.evaluation import few_shot_accuracy
from l2l_prune.reptile.adapt_only import AdaptOnly
from l2l_prune.reptile.best_channels import best_channels
from l2l_prune.reptile.reptile import PrunedReptile
from l2l_prune.shipping.costs import Adapting, adaptation_costs
from l2l_prune.shipping.folder import TENSORS, export
from l2l_prune.shipping.formats import export_onnx, export_program

PARTS: dict[str, AdaptOnly | None] = {
    "all": None,
    "last block": ["features.conv4", "features.norm4", "classifier"],
    "head": "classifier",
}
"""Which parts of the four-block network adapt."""

BEST = "best channels"
SHARE = 0.25
"""The largest share of the weights in the channels that adapt, of all layers."""

_MOST_TASKS = 200
_ABOUT = ("algorithm", "ways", "shots", "inner_lr", "eval_steps", "eval_batch", "transductive")


def export_run(
    folder: Path, out: Path, *, half: bool = False, onnx: bool = False, program: bool = False
) -> list[str]:
    """Export the network of a finished run; nothing is written unless everything can be.

    Args:
        folder: The run's folder, or one with a single run in it.
        out: The folder to write to; made if missing. An export in it is replaced, with all of its
            formats.
        half: As for :func:`~l2l_prune.shipping.export`.
        onnx: Also write ``model.onnx``.
        program: Also write ``model.pt2``, with ``torch.export``.

    Returns:
        Lines that describe what was written.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ImportError: If an extra is missing.
        ValueError: If there are several runs, a file is damaged, or another format gives outputs
            that differ.
    """
    run = _only_run(folder)
    config, data = run.settings_on_cpu(), _unseen_images(run)
    net = restored_network(run, data)
    result = read_result(run.entry, run.folder / "results.json")
    about = {name: getattr(config, name) for name in _ABOUT}
    about |= {"method": run.method, "seed": config.seed, "measure": config.measure.name}
    about |= {"scored_on": config.held_out}
    if config.algorithm == "reptile":
        about |= {"optimizer_state": "carried over in what was scored, not exported"}
    if config.algorithm in LEARN_MORE:
        about |= {"inner_steps": "learned by entry in what was scored, not exported"}
    shape = (5, 2) if config.picture_tasks else (5, *data.images.shape[1:])
    example = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    lines = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        told = export(net, place, half=half, data=config.data, accuracy=result.test, about=about)
        if onnx:
            difference = export_onnx(net, place / "model.onnx", example)
            lines.append(f"ONNX Runtime gives the same outputs to {difference:.1g}")
        if program:
            difference = export_program(net, place / "model.pt2", example)
            lines.append(f"torch.export's program gives the same outputs to {difference:.1g}")
        out.mkdir(parents=True, exist_ok=True)
        for other in ("model.onnx", "model.pt2"):  # of another network, if this export has none
            if not (place / other).exists():
                (out / other).unlink(missing_ok=True)
        for file in sorted(place.iterdir()):
            with replace_file(out / file.name) as temporary:
                temporary.write_bytes(file.read_bytes())
            lines.append(f"wrote {out / file.name}, {file.stat().st_size:,} bytes")
    rates, size = told["rates"], told["files"][TENSORS]["bytes"]
    lines.append(
        f"{run.method}: {rates['parameters']:,} weights, {100 * rates['zero']:.1f}% of them 0; "
        f"the tensors take {size:,} bytes, dense in float32 they would {4 * rates['parameters']:,}"
    )
    return lines


def measure_adaptation(folder: Path) -> list[Path]:
    """Measure what adapting costs the Reptile runs of a folder, for its report.

    For each method, the run of the first seed is measured on its own unseen classes. Masks are held
    as in the run's last phase. Besides whole layers, those channels adapt that
    :func:`~l2l_prune.reptile.best_channels.best_channels` chooses on tasks of the training classes:
    once, before the device. The inner optimizer starts afresh, as on a device: in the run's own
    scores it carries its state over from training, so they can be higher.

    Args:
        folder: The folder of the report.

    Returns:
        The files, see :func:`~l2l_prune.experiments.report.adaptation.write_adaptation`.

    Raises:
        ValueError: If no run is a Reptile run with its weights, or the runs have different tasks.
    """
    runs: dict[str, FinishedRun] = {}
    found = [run for run in read_folder(folder).runs if run.config["algorithm"] == "reptile"]
    found = [run for run in found if run.weights_file.path.is_file()]
    for run in sorted(found, key=lambda run: (not run.dense, run.seed)):
        runs.setdefault(f"{run.size} {run.method}", run)
    if not runs:
        raise ValueError(
            f"there is no reptile run with its weights in {folder}: the cost of adapting is "
            "measured only for such runs"
        )
    first = next(iter(runs.values()))
    config, data = first.settings_on_cpu(), _unseen_images(first)
    tasks = (
        *("data", "data_root", "split", "image_size", "ways", "shots", "queries", "held_out"),
        *("eval_steps", "eval_batch", "transductive", "bf16"),
    )
    for run in runs.values():
        own = run.settings_on_cpu()
        if other := [n for n in tasks if getattr(own, n) != getattr(config, n)]:
            raise ValueError(
                f"the runs in {folder} differ in {', '.join(other)}: give a folder of one setting"
            )
    config = dataclasses.replace(config, final_tasks=min(config.final_tasks, _MOST_TASKS))
    episodes = list(evaluation_tasks(data, config, "final tasks", config.held_out))
    ways, accuracies = {}, {}
    for name, run in runs.items():
        reptile = restored_reptile(run, data)
        for part, only in {**PARTS, BEST: _best_channels(reptile, run.settings_on_cpu())}.items():
            way = f"{name}, {part}"
            ways[way] = Adapting(reptile, only)
            accuracies[way] = few_shot_accuracy(
                reptile,
                episodes,
                steps=config.eval_steps,
                batch_size=config.eval_batch,
                transductive=config.transductive,
                generator=stream(config.seed, "evaluation minibatches"),
                adapt_only=only,
            )
    steps, batch = max(1, config.eval_steps), config.eval_batch
    costs = adaptation_costs(ways, episodes[0], steps=steps, batch_size=batch)
    return write_adaptation(folder, costs, accuracies)


def _best_channels(reptile: PrunedReptile, config: RunConfig) -> AdaptOnly:
    tasks = evaluation_tasks(load_split(config, "train"), config, "curve tasks", "train")
    return best_channels(reptile, ((t.support_x, t.support_y) for t in tasks), share=SHARE)


def _only_run(folder: Path) -> FinishedRun:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found = read_folder(folder)
    if not found.runs:
        raise ValueError(f"there is no finished run in {folder}")
    if len(found.runs) > 1:
        names = ", ".join(sorted({str(run.folder) for run in found.runs}))
        raise ValueError(f"{folder} holds {len(found.runs)} runs: give the folder of one: {names}")
    return found.runs[0]


def _unseen_images(run: FinishedRun) -> Images:
    config = run.settings_on_cpu()
    needed = config.shots + config.queries
    return load_images(config.data, config.held_out, least_images=needed, **config.data_options)
