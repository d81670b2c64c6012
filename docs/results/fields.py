"""The study of docs/results/fields-plan.md: ``python docs/results/fields.py --out runs/fields``.

Each job (one seed and one method) writes a file when done, and is not run again after that.
``--report`` writes fields.csv, the figures and the tables from the jobs that are finished.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l_prune import Pruner, Schedule
from l2l_prune._basics.tensor_files import load_tensors, save_tensors
from l2l_prune.experiments.report.seed_statistics import OverSeeds
from l2l_prune.fewshot.data import Glyphs
from l2l_prune.fewshot.evaluation import PSNR, paired_difference
from l2l_prune.metalearners.field_files import export_field, read_field
from l2l_prune.metalearners.fields import FieldMAML, ImageSignals, Siren, psnr
from l2l_prune.schedules.common import metasparse

HERE = Path(__file__).parent
WIDTH, DEPTH, OMEGA = 64, 3, 30.0
SIGNALS, INNER_LR, OUTER_LR, FIT_LR = 3, 0.01, 1e-3, 3e-3
SCHEDULE = metasparse(0.95, pretrain=400, interval=100)
LEVELS = {100: 0, 50: 3, 25: 6, 10: 10, 5: 14}  # about this % of weights: after which round
UNSEEN, SHOWN = 32, 3
ARMS = ("magnitude", "narrow", "random", "one-shot", "no meta-learning", "dense", "layerwise")


class Data:
    """The signals of one seed: characters to learn from, and other characters to evaluate on."""

    def __init__(self, seed: int) -> None:
        def glyphs(split: str) -> Tensor:
            return Glyphs(split, split_by="random", seed=seed).images

        self.train = ImageSignals(glyphs("train"))
        drawn = torch.randperm(len(test := glyphs("test")), generator=generator(seed, 1))
        self.unseen = ImageSignals(test[drawn[:UNSEEN]])


def generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(10 * seed + stream)


def learner(seed: int, width: int | None = None) -> FieldMAML:
    siren = Siren(width=width or WIDTH, depth=DEPTH, omega_0=OMEGA, generator=generator(seed, 2))
    return FieldMAML(siren, lr=INNER_LR, steps=2)


def optimizer(maml: FieldMAML) -> torch.optim.Adam:
    return torch.optim.Adam(maml.parameters(), OUTER_LR)


def train(
    maml: FieldMAML, opt: torch.optim.Adam, data: Data, drawn: torch.Generator, iterations: int
) -> Iterator[int]:
    for iteration in range(iterations):
        opt.zero_grad()
        maml.loss(data.train.coordinates, data.train.sample(SIGNALS, drawn)).backward()
        opt.step()
        yield iteration


def total(maml: FieldMAML) -> int:
    return sum(p.numel() for p in maml.parameters())


def biases(maml: FieldMAML) -> int:
    return sum(p.numel() for p in maml.parameters() if p.dim() == 1)


def kept(level: int) -> int:
    """The number of weights and biases that remain at a level."""
    full = learner(0)
    weights = total(full) - biases(full)
    rate = SCHEDULE.segments[LEVELS[level]].sparsity if LEVELS[level] else 0.0
    return weights - round(float(rate) * weights) + biases(full)


def narrow_width(level: int) -> int:
    """The width of the dense network whose number of parameters is closest to a level's."""
    return min(range(2, WIDTH + 1), key=lambda w: abs(total(learner(0, w)) - kept(level)))


def measured(
    level: int, parameters: int, data: Data, two: Tensor | None, many: Tensor
) -> dict[str, Any]:
    """A row: PSNR of each unseen signal after 2 and 100 steps, and the first reconstructions."""
    y = data.unseen.values
    return {
        "level": level,
        "parameters": parameters,
        "2": None if two is None else psnr(two, y).tolist(),
        "100": psnr(many, y).tolist(),
        "pictures": many[:SHOWN].clone(),
    }


def evaluate(maml: FieldMAML, level: int, parameters: int, data: Data) -> dict[str, Any]:
    x, y = data.unseen.coordinates, data.unseen.values
    with torch.no_grad():
        two = maml(x, maml.adapt(x, y))
        fitted = maml.fit(x, y, steps=100, lr=FIT_LR)
        row = measured(level, parameters, data, two, maml(x, fitted))
        files = [export_field(maml.field(fitted, number)) for number in range(SHOWN)]
        plain = learner(0, maml.module.layers[0].out_features).module
        back = torch.stack([read_field(file, plain)(x) for file in files])
    row["bytes"] = [len(file) for file in files]
    row["100, read back"] = psnr(back, y[:SHOWN]).tolist()
    return row


# ---- the methods ------------------------------------------------------------------------------


def pretrained(seed: int, data: Data, out: Path) -> dict[str, Any]:
    """The dense phase, from which magnitude, random and one-shot continue."""
    path = out / f"{seed}-pretrained.pt"
    if not path.exists():
        maml, drawn = learner(seed), generator(seed, 3)
        opt = optimizer(maml)
        for _ in train(maml, opt, data, drawn, SCHEDULE.segments[0].iterations):
            pass
        state = {"model": maml.state_dict(), "optimizer": opt.state_dict()}
        save_tensors({**state, "drawn": drawn.get_state()}, path)
    return load_tensors(path)


def rounds(seed: int, arm: str, data: Data, out: Path) -> Iterator[dict[str, Any]]:
    state = pretrained(seed, data, out)
    maml, drawn, chance = learner(seed), generator(seed, 3), generator(seed, 4)
    opt = optimizer(maml)
    maml.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    drawn.set_state(state["drawn"])

    def by_chance(weight: Tensor) -> Tensor:  # what is pruned stays pruned, as with magnitude
        return (1 + torch.rand(weight.shape, generator=chance)) * (weight != 0)

    options: dict[str, Any] = {"criterion": by_chance} if arm == "random" else {}
    allocation = "layerwise" if arm == "layerwise" else "global"
    schedule = Schedule(SCHEDULE.segments[1:])
    pruner = Pruner(maml, schedule, opt, allocation=allocation, **options)
    if arm == "magnitude":
        dense = learner(seed)
        dense.load_state_dict(state["model"])
        yield evaluate(dense, 100, total(dense), data)
    ends = {LEVELS[level] * schedule.segments[0].iterations: level for level in LEVELS}
    for iteration in train(maml, opt, data, drawn, schedule.iterations):
        if level := ends.get(iteration + 1):
            # The optimizer's step does not move pruned weights: their gradients are 0.
            left = sum(int(mask.sum()) for mask in pruner.masks.values()) + biases(maml)
            assert left == kept(level) or arm == "layerwise"
            yield evaluate(maml, level, left, data)
        pruner.step()


def dense_run(seed: int, width: int, level: int, data: Data) -> dict[str, Any]:
    maml = learner(seed, width)
    for _ in train(maml, optimizer(maml), data, generator(seed, 3), SCHEDULE.iterations):
        pass
    return evaluate(maml, level, total(maml), data)


def per_signal(seed: int, arm: str, data: Data, out: Path) -> Iterator[dict[str, Any]]:
    """Each signal by itself: 50 steps, pruned by magnitude, 50 steps."""
    maml = learner(seed)
    if arm == "one-shot":
        maml.load_state_dict(pretrained(seed, data, out)["model"])
    x, y = data.unseen.coordinates, data.unseen.values
    half = maml.fit(x, y, steps=50, lr=FIT_LR)
    for level, number in LEVELS.items():
        done = []
        for signal in range(len(y)):
            own = FieldMAML(maml.field(half, signal))
            if number:
                Pruner(own, Schedule((SCHEDULE.segments[number],)), allocation="global")
            done.append(own(x, own.fit(x, y[signal : signal + 1], steps=50, lr=FIT_LR))[0])
        yield measured(level, kept(level), data, None, torch.stack(done))


def run(seed: int, arm: str, out: Path) -> None:
    path = out / f"{seed}-{arm.replace(' ', '-')}.pt"
    if path.exists():
        return
    data = Data(seed)
    if arm in ("magnitude", "random", "layerwise"):
        rows = list(rounds(seed, arm, data, out))
    elif arm == "dense":
        rows = [dense_run(seed, WIDTH, 100, data)]
    elif arm == "narrow":
        rows = [dense_run(seed, narrow_width(n), n, data) for n in LEVELS if n < 100]
    else:
        rows = list(per_signal(seed, arm, data, out))
    save_tensors({"rows": rows, "signals": data.unseen.values[:SHOWN].clone()}, path)
    print(f"seed {seed}, {arm}: done", flush=True)


# ---- the report -------------------------------------------------------------------------------

Rows = dict[tuple[str, int], dict[int, dict[str, Any]]]  # by method and level, by seed


def finished(out: Path) -> tuple[Rows, dict[int, Tensor]]:
    """All rows, and the signals of each seed that are shown."""
    rows: Rows = defaultdict(dict)
    shown = {}
    for seed in range(100):
        for arm in ARMS:
            path = out / f"{seed}-{arm.replace(' ', '-')}.pt"
            if path.exists():
                job = load_tensors(path)
                shown[seed] = job["signals"]
                for row in job["rows"]:
                    rows[arm, row["level"]][seed] = row
    return rows, shown


def over_seeds(by_seed: dict[int, dict[str, Any]], steps: str) -> OverSeeds:
    """The mean over the unseen signals of each seed."""
    means = (sum(row[steps]) / len(row[steps]) for _, row in sorted(by_seed.items()))
    return OverSeeds(tuple(means), PSNR)


def told(mean: OverSeeds) -> str:
    return f"{mean.mean:.1f} ± {mean.ci95:.1f}"


def difference(rows: Rows, arm: str, rival: str, level: int, steps: str) -> str:
    """The difference in PSNR over the seeds that both have."""
    a, b = rows[arm, level], rows[rival, level]
    both = a.keys() & b.keys()
    if len(both) < 2:
        return "-"
    pair = [over_seeds({s: r[s] for s in both}, steps) for r in (a, b)]
    apart = paired_difference(*pair)
    sign = "+" if apart.mean >= 0 else ""
    return f"{sign}{told(apart)} ({apart.verdict('better', 'worse')})"


def tables(rows: Rows) -> str:
    from tabulate import tabulate

    lines, apart = [], []
    for arm in ARMS:
        for level in LEVELS:
            if by_seed := rows.get((arm, level)):
                row = next(iter(by_seed.values()))
                two = "-" if row["2"] is None else told(over_seeds(by_seed, "2"))
                cells = (arm, f"{level}%", row["parameters"], two)
                lines.append((*cells, told(over_seeds(by_seed, "100")), len(by_seed)))
    for level in LEVELS:
        for rival in ("narrow", "random", "layerwise", "one-shot", "no meta-learning"):
            if level < 100 and ("magnitude", level) in rows and (rival, level) in rows:
                two = "-"
                if next(iter(rows[rival, level].values()))["2"] is not None:
                    two = difference(rows, "magnitude", rival, level, "2")
                many = difference(rows, "magnitude", rival, level, "100")
                apart.append((f"{level}%", rival, two, many))
    heads = ("method", "weights", "parameters", "2 steps [dB]", "100 steps [dB]", "seeds")
    first = tabulate(lines, heads, "github", disable_numparse=True)
    heads = ("weights", "magnitude minus", "2 steps [dB]", "100 steps [dB]")
    return f"{first}\n\n{tabulate(apart, heads, 'github', disable_numparse=True)}"


def stated(rows: Rows) -> str:
    """The plan's comparisons, with Holm's correction within each hypothesis."""
    from scipy import stats
    from statsmodels.stats.multitest import multipletests
    from tabulate import tabulate

    small = (25, 10, 5)
    families = {
        "1": [("magnitude", "narrow", n, steps) for n in (10, 5) for steps in ("2", "100")],
        "2": [("magnitude", "random", n, steps) for n in small for steps in ("2", "100")],
        "3": [("magnitude", a, n, "100") for a in ("one-shot", "no meta-learning") for n in small],
        "4": [("magnitude", "dense", 50, "2")],
        "5": [("layerwise", "magnitude", n, s) for n in (50, *small) for s in ("2", "100")],
    }
    lines = []
    for family, comparisons in families.items():
        judged = []
        for arm, rival, level, steps in comparisons:
            a, b = rows.get((arm, level), {}), rows.get((rival, 100 if rival == "dense" else level))
            if not a or not b or (both := a.keys() & b.keys()) == set():
                continue
            pair = [over_seeds({s: r[s] for s in both}, steps) for r in (a, b)]
            apart = paired_difference(*pair)
            # Hypothesis 4 has a one-sided bound of 1 dB.
            bound, side = (-1.0, "greater") if family == "4" else (0.0, "two-sided")
            p = float(stats.ttest_1samp(apart.values, bound, alternative=side).pvalue)
            judged.append(((f"{arm} - {rival}", f"{level}%", steps), apart, p))
        if not judged:
            continue
        corrected = multipletests([p for *_, p in judged], method="holm")[1]
        for (what, apart, p), after in zip(judged, corrected, strict=True):
            shown = "not shown"
            if after < 0.05:
                better = "loses less than 1 dB" if family == "4" else "better"
                shown = better if family == "4" or apart.mean > 0 else "worse"
            width = f"{apart.mean:+.1f} ± {apart.ci95:.1f}"
            lines.append((family, *what, width, f"{p:.2g}", f"{after:.2g}", shown))
    heads = ("hypothesis", "comparison", "weights", "steps", "dB", "p", "p (Holm)", "verdict")
    return tabulate(lines, heads, "github", disable_numparse=True)


def sizes(rows: Rows, shown: dict[int, Tensor]) -> str:
    """The mean bytes of the exported fields and the PNG files of the signals that are shown."""
    import io

    from PIL import Image
    from tabulate import tabulate

    png = []
    for values in shown.values():
        for own in values:
            side = round(len(own) ** 0.5)
            picture = (255 * own.view(side, side)).round().to(torch.uint8)
            file = io.BytesIO()
            Image.fromarray(picture.numpy()).save(file, "PNG", optimize=True)
            png.append(file.tell())
    lines = [("PNG, exact", f"{sum(png) / len(png):.0f}", "-")]
    for (arm, level), by_seed in rows.items():
        if arm in ("magnitude", "narrow"):
            every = [size for row in by_seed.values() for size in row["bytes"]]
            back = told(over_seeds(by_seed, "100, read back"))
            lines.append((f"{arm}, {level}%", f"{sum(every) / len(every):.0f}", back))
    return tabulate(lines, ("signal as", "bytes", "100 steps, read back [dB]"), "github")


def write_csv(rows: Rows, name: str) -> None:
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "level", "seed", "parameters", "psnr_2", "psnr_100"))
        for (arm, level), by_seed in rows.items():
            for seed, row in sorted(by_seed.items()):
                one = {seed: row}
                two = "" if row["2"] is None else f"{over_seeds(one, '2').mean:.3f}"
                many = f"{over_seeds(one, '100').mean:.3f}"
                writer.writerow((arm, level, seed, row["parameters"], two, many))


def curve(rows: Rows, name: str) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for ax, steps in zip(axes, ("2", "100"), strict=True):
        for place, arm in enumerate(ARMS):
            points = []
            for level in LEVELS:
                by_seed = rows.get((arm, level), {})
                if by_seed and next(iter(by_seed.values()))[steps] is not None:
                    mean = over_seeds(by_seed, steps)
                    count = next(iter(by_seed.values()))["parameters"]
                    points.append((count, mean.mean, mean.ci95))
            if points:
                x, y, width = zip(*points, strict=True)
                style = {"fmt": "o-" if len(x) > 1 else "s", "ms": 4, "capsize": 2}
                ax.errorbar(x, y, width, color=f"C{place}", label=arm, **style)
        counts = {
            next(iter(rows["magnitude", level].values()))["parameters"]
            for level in LEVELS
            if ("magnitude", level) in rows
        }
        ax.set(xscale="log", xlabel="parameters", ylabel="PSNR [dB]", title=f"{steps} steps")
        ax.set_xticks(sorted(counts), [f"{count:,}" for count in sorted(counts)])
        ax.set_xticks([], minor=True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    fig.savefig(HERE.parent / "img" / f"{name}-psnr.png", dpi=120)
    plt.close(fig)


def pictures(rows: Rows, shown: dict[int, Tensor], level: int, name: str) -> None:
    """The same unseen signals by each method at equal size, next to the originals."""
    import matplotlib.pyplot as plt

    seed = min(shown)
    arms = [arm for arm in ARMS if seed in rows.get((arm, level), {})]
    columns = [("signal", shown[seed]), *((a, rows[a, level][seed]["pictures"]) for a in arms)]
    size = (1.3 * len(columns), 1.45 * SHOWN)
    fig, axes = plt.subplots(SHOWN, len(columns), figsize=size, layout="constrained")
    for column, (method, values) in enumerate(columns):
        for number, own in enumerate(values):
            ax, side = axes[number, column], round(len(own) ** 0.5)
            ax.imshow(own.view(side, side), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            if column:
                ax.set_xlabel(f"{psnr(own, shown[seed][number]):.1f} dB", fontsize=7)
            if not number:
                ax.set_title(method, fontsize=8)
    fig.savefig(HERE.parent / "img" / f"{name}-signals-{level}.png", dpi=120)
    plt.close(fig)


def report(out: Path) -> None:
    rows, shown = finished(out)
    name = "fields" if WIDTH == 64 else f"fields-{WIDTH}"
    write_csv(rows, name)
    curve(rows, name)
    for level in (25, 10, 5):
        pictures(rows, shown, level, name)
    print(tables(rows))
    print()
    print(stated(rows))
    print()
    print(sizes(rows, shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/fields"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    global WIDTH
    WIDTH = options.width
    if options.report:
        report(options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in options.methods:
            run(seed, arm, options.out)


if __name__ == "__main__":
    main()
