"""PruningCallback in real Lightning trainers, learn2learn's four algorithms included."""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from l2l_prune import Pruner, Schedule, Segment, TaskMasks, dense_state_dict

pl = pytest.importorskip("pytorch_lightning")
algorithms = pytest.importorskip("learn2learn.algorithms.lightning")

from l2l_prune.integrations.lightning import PruningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SCHEDULE = Schedule(
    (
        Segment(2, phase="pretrain"),
        Segment(4, sparse=True, sparsity=0.5, phase="prune"),
        Segment(2, phase="retrain"),
        Segment(4, sparse=True, sparsity=0.25, phase="prune"),
    )
)


class Net(nn.Module):
    def __init__(self, out=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(16, out)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1))


class Tasks(torch.utils.data.Dataset):
    """Three ways, one shot, two queries, in the order that learn2learn's modules expect."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return (
            torch.randn(9, 1, 4, 4, generator=generator),
            torch.arange(3).repeat_interleave(3),
        )


def loader(length=12):
    return DataLoader(Tasks(length), batch_size=None)


WAYS = {
    f"{split}_{kind}": n
    for split in ("train", "test")
    for kind, n in (("ways", 3), ("shots", 1), ("queries", 2))
}
MODULES = {
    "maml": lambda: algorithms.LightningMAML(Net(), adaptation_lr=0.1, lr=0.01, **WAYS),
    "anil": lambda: algorithms.LightningANIL(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten()),
        nn.Linear(16, 3),
        lr=0.01,
        **WAYS,
    ),
    "protonet": lambda: algorithms.LightningPrototypicalNetworks(Net(8), lr=0.01, **WAYS),
    "metaoptnet": lambda: algorithms.LightningMetaOptNet(Net(8), lr=0.01, **WAYS),
}


def trainer(folder, callbacks, epochs=1, **options):
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **options},
    )


class Watch(pl.Callback):
    """Looks at the weights after every batch, from outside."""

    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def on_train_batch_end(self, trainer, module, *args):
        pruner = self.pruning.pruner
        for name, mask in pruner.masks.items():
            path, _, weight = name.rpartition(".")
            assert (getattr(module.get_submodule(path), weight)[~mask] == 0).all()
        self.seen.append((pruner.iteration, pruner.phase, round(pruner.sparsity, 2)))


@pytest.mark.parametrize("name", MODULES)
def test_learn2learn_algorithms(tmp_path, name):
    torch.manual_seed(0)
    pruning = PruningCallback(SCHEDULE)
    watch = Watch(pruning)
    trainer(tmp_path, [pruning, watch]).fit(MODULES[name](), loader())
    phases = [SCHEDULE.segment(i).phase for i in range(1, 13)]
    assert [phase for _, phase, _ in watch.seen] == phases
    assert [i for i, *_ in watch.seen] == list(range(1, 13))
    sparsities = [s for _, _, s in watch.seen]
    assert sparsities == pytest.approx([0, 0.5, 0.5, 0.5, 0.5, 0, 0] + [0.25] * 5, abs=0.02)


@pytest.mark.parametrize("name", MODULES)
def test_equals_a_plain_loop_with_pruner(tmp_path, name):
    torch.manual_seed(0)
    module = MODULES[name]()
    twin = copy.deepcopy(module)
    pruning = PruningCallback(SCHEDULE)
    trainer(tmp_path, [pruning]).fit(module, loader())
    (optimizer,), (scheduler,) = twin.configure_optimizers()
    pruner = Pruner(twin, SCHEDULE, optimizer)
    twin.train()
    for index, batch in enumerate(loader()):
        optimizer.zero_grad()
        twin.meta_learn(batch, index, 3, 1, 2)[0].backward()
        optimizer.step()
        pruner.step()
    scheduler.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    pruning = PruningCallback(SCHEDULE)
    trainer(tmp_path, [pruning], accumulate_grad_batches=3).fit(Plain(), loader(12))
    assert pruning.pruner.iteration == 4


class TwoOptimizers(Plain):
    """Manual optimization: a conv optimizer, a head optimizer, and one over something else."""

    def __init__(self, prunable=True):
        super().__init__()
        self.automatic_optimization = False
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        loss = self.scale * super().training_step(batch, index)
        other, conv, head = self.optimizers()
        for optimizer in (other, conv, head):
            optimizer.zero_grad()
        self.manual_backward(loss)
        other.step()
        other.step()
        conv.step()
        head.step()

    def configure_optimizers(self):
        return (
            torch.optim.SGD([self.scale], lr=0.1),
            torch.optim.SGD(self.net.conv.parameters(), lr=0.1, momentum=0.9),
            torch.optim.SGD(self.net.head.parameters(), lr=0.1, momentum=0.9),
        )


def test_several_optimizers(tmp_path):
    pruning = PruningCallback(SCHEDULE)
    watch = Watch(pruning)
    trainer(tmp_path, [pruning, watch]).fit(TwoOptimizers(), loader())
    assert [i for i, *_ in watch.seen] == list(range(1, 13))
    assert len(pruning.pruner.optimizers) == 2


@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_resumes_exactly_from_any_step(tmp_path, name):
    """Epochs of one task each, since Lightning itself does not rewind a loader within an epoch."""
    torch.manual_seed(0)
    whole = MODULES[name]()
    start = copy.deepcopy(whole)
    first = PruningCallback(SCHEDULE)
    saving = pl.callbacks.ModelCheckpoint(
        dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}"
    )
    trainer(tmp_path, [first, saving], epochs=12, enable_checkpointing=True).fit(whole, loader(1))
    for step in (1, 2, 4, 6, 7, 9):
        module, again = copy.deepcopy(start), PruningCallback(SCHEDULE)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        trainer(tmp_path, [again], epochs=12).fit(
            module, loader(1), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
        assert again.pruner.iteration == 12
        for a, b in zip(whole.parameters(), module.parameters(), strict=True):
            assert torch.equal(a, b), step
        assert repr(again.pruner) == repr(first.pruner)


def test_testing_a_checkpoint_and_dense_weights(tmp_path):
    torch.manual_seed(0)
    module = MODULES["maml"]()
    keys = list(module.state_dict())
    dense = tmp_path / "dense.pt"
    pruning = PruningCallback(SCHEDULE, dense_weights=dense)
    fit = trainer(tmp_path, [pruning], inference_mode=False)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(dense, weights_only=True)
    assert list(state) == keys
    assert (state["model.module.head.weight"] == 0).sum() == 12
    fresh = MODULES["maml"]()
    fresh.load_state_dict(state)
    (ours,) = fit.test(module, loader(3), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    x = loader().dataset[0][0]
    assert torch.equal(fresh.model(x), module.model(x))
    (resumed,) = trainer(tmp_path, [PruningCallback(SCHEDULE)], inference_mode=False).test(
        MODULES["maml"](), loader(3), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert ours == resumed  # both adapt under the mask
    assert list(pruning.pruner.finalize().state_dict()) == keys


STARTS_SPARSE = Schedule((Segment(4, sparse=True, sparsity=0.5), Segment(2)))


class Evaluated(Plain):
    def test_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    predict_step = validation_step = test_step


def same_weights(module, before):
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_evaluation_leaves_a_module_as_it_was(tmp_path, stage):
    """Neither the schedule's start nor an earlier fit prunes what is only looked at."""
    evaluated = Evaluated()
    before = copy.deepcopy(evaluated.state_dict())
    plain = trainer(tmp_path, [])
    expected = getattr(plain, stage)(evaluated, loader(3), verbose=False)
    pruning = PruningCallback(STARTS_SPARSE)
    ours = trainer(tmp_path, [pruning])
    assert getattr(ours, stage)(evaluated, loader(3), verbose=False) == expected
    assert same_weights(evaluated, before)

    fitted = Evaluated()
    ours.fit(fitted, loader(3))
    ours.save_checkpoint(tmp_path / "sparse.ckpt")
    pruning = PruningCallback(STARTS_SPARSE)
    resumed = trainer(tmp_path, [pruning], epochs=1)
    resumed.fit(Evaluated(), loader(3), ckpt_path=tmp_path / "sparse.ckpt")
    assert pruning.pruner.iteration == 3
    held = pruning.pruner.masks
    assert getattr(resumed, stage)(evaluated, loader(3), verbose=False) == expected
    assert same_weights(evaluated, before)
    assert all(torch.equal(pruning.pruner.masks[name], mask) for name, mask in held.items())

    sparse = getattr(plain, stage)(fitted, loader(3), verbose=False)
    asked = {"ckpt_path": tmp_path / "sparse.ckpt", "verbose": False}
    assert getattr(resumed, stage)(evaluated, loader(3), **asked) == sparse
    assert type(evaluated.net.head) is nn.Linear
    assert (evaluated.net.head.weight == 0).sum() == 24  # the checkpoint's


def test_an_evaluation_that_fails_leaves_no_masks(tmp_path):
    class Failing(Evaluated):
        def test_step(self, batch, index):
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, [PruningCallback(SCHEDULE)]).test(module, loader(3), verbose=False)
    assert type(module.net.head) is nn.Linear


def test_folds_share_no_state(tmp_path):
    """A second module starts the schedule anew, also after a resumed fit of the first."""
    first = PruningCallback(SCHEDULE)
    begun = trainer(tmp_path, [first], epochs=1)
    begun.fit(Plain(), loader(4))
    begun.save_checkpoint(tmp_path / "fold.ckpt")
    pruning = PruningCallback(SCHEDULE)
    trainer(tmp_path, [pruning], epochs=2).fit(Plain(), loader(4), ckpt_path=tmp_path / "fold.ckpt")
    assert pruning.pruner.iteration == 8
    fold = Plain()
    twin = copy.deepcopy(fold)
    trainer(tmp_path, [pruning]).fit(fold, loader(3))
    assert pruning.pruner.model is fold
    assert pruning.pruner.iteration == 3
    alone = PruningCallback(SCHEDULE)
    trainer(tmp_path, [alone]).fit(twin, loader(3))
    assert same_weights(fold, twin.state_dict())


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_steps_that_the_scaler_skips_do_not_count(tmp_path, options):
    """A fused optimizer is called for each of them, and skips inside of its kernel."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    class Overflowing(Plain):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * (float("inf") if index in (1, 4) else 1)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01, **options)

    pruning, seen = PruningCallback(SCHEDULE), []

    class Counting(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(pruning.pruner.iteration)

    plugin = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
    module = Overflowing()
    trainer(tmp_path, [pruning, Counting()], plugins=[plugin]).fit(module, loader(7))
    assert seen == [1, 1, 2, 3, 3, 4, 5]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_logs_sparsity_and_phase(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    pruning = PruningCallback(SCHEDULE)
    trainer(tmp_path, [pruning], logger=logger, log_every_n_steps=1).fit(Plain(), loader())
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["pruning/phase"]) for row in rows] == [
        SCHEDULE.index(i) for i in range(1, 13)
    ]
    assert max(float(row["pruning/sparsity"]) for row in rows) == pytest.approx(0.5, abs=0.02)


def test_misuse_is_told(tmp_path):
    with pytest.raises(TypeError, match="schedule"):
        PruningCallback(0.5)

    class Elsewhere(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([self.net.head.bias], lr=0.1)

    with pytest.raises(ValueError, match="none of the trainer's optimizers"):
        trainer(tmp_path, [PruningCallback(SCHEDULE)]).fit(Elsewhere(), loader())
    with pytest.raises(ValueError, match="'nope'"):
        trainer(tmp_path, [PruningCallback(SCHEDULE, only="nope")]).fit(Plain(), loader())
    with pytest.raises(RuntimeError, match="not set up"):
        PruningCallback(SCHEDULE).on_fit_start(None, Plain())


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_layer_that_is_made_after_the_masks_is_refused(tmp_path, hook):
    class Late(Plain):
        def training_step(self, batch, index):
            return F.cross_entropy(self.last(self.net(batch[0])), batch[1])

    def make(module, stage=None):
        module.teacher = Net().requires_grad_(False)  # is never pruned
        module.last = nn.Linear(3, 3)

    setattr(Late, hook, make)
    with pytest.raises(ValueError, match=f"^last.weight would not be pruned: .*{hook}"):
        trainer(tmp_path, [PruningCallback(SCHEDULE)]).fit(Late(), loader())
    pruning = PruningCallback(SCHEDULE, skip=lambda name, module: name == "last")
    trainer(tmp_path, [pruning]).fit(Late(), loader())
    assert set(pruning.pruner.masks) == {"net.conv.weight", "net.head.weight"}


def test_a_batch_that_the_module_skips_leaves_no_task_open(tmp_path):
    zeros = []

    class Skipping(Plain):
        def on_train_batch_start(self, batch, index):
            return -1 if index == 3 else None

        def on_train_epoch_end(self):
            zeros.append(int((self.net.head.weight == 0).sum()))

    schedule = Schedule((Segment(12, sparse=True, sparsity=0.5, masks="task"),))
    pruning = PruningCallback(schedule, task_masks=TaskMasks(torch.Generator().manual_seed(0)))
    trainer(tmp_path, [pruning], epochs=2).fit(Skipping(), loader(6))
    assert pruning.pruner.iteration == 6
    assert zeros == [0, 0]


def test_a_module_can_be_fitted_again(tmp_path):
    module, pruning = Plain(), PruningCallback(SCHEDULE)
    for _ in range(3):
        trainer(tmp_path, [pruning]).fit(module, loader())
        assert len(pruning.pruner.optimizers) == 1
    assert pruning.pruner.iteration == 36
    pruning.pruner.finalize()
    trainer(tmp_path, [pruning]).fit(module, loader())
    assert pruning.pruner.iteration == 12
    assert pruning.pruner.sparse


class OwnEMA:
    """What an average of plain weights would be."""

    def __init__(self, decay):
        self.decay, self.average = decay, None

    def update(self, module):
        now = {k: v.clone() for k, v in dense_state_dict(module).items()}
        if self.average is None:
            self.average = now
        else:
            for key, value in self.average.items():
                value.mul_(self.decay).add_(now[key], alpha=1 - self.decay)


class Averaging(pl.Callback):
    """Compares Lightning's average, while it is in the module, with one by hand."""

    def __init__(self):
        self.own, self.compared = OwnEMA(0.9), 0

    def on_train_batch_end(self, trainer, module, *args):
        self.own.update(module)

    def on_validation_batch_end(self, trainer, module, *args):
        if self.own.average is not None:
            net = Net()
            net.load_state_dict(
                {key.removeprefix("net."): value for key, value in self.own.average.items()}
            )
            x = torch.randn(5, 1, 4, 4)
            torch.testing.assert_close(module.net(x), net(x), atol=1e-5, rtol=1e-4)
            self.compared += 1


def test_weight_averaging_does_not_shrink_weights(tmp_path):
    averaging = getattr(pl.callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")

    class Validated(Plain):
        def validation_step(self, batch, index):
            self.net(batch[0])

    pruning, watch, module = PruningCallback(SCHEDULE), Averaging(), Validated()
    ema = averaging(decay=0.9)
    callbacks = [pruning, ema, watch]
    fit = trainer(tmp_path, callbacks, epochs=2, num_sanity_val_steps=0, val_check_interval=3)
    fit.fit(module, loader(), loader(1))
    assert watch.compared == 8
    for layer in (module.net.conv, module.net.head):
        assert set(layer.weight_mask.unique().tolist()) <= {0, 1}
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    with pytest.raises(ValueError, match="put PruningCallback before it"):
        trainer(tmp_path, [averaging(), PruningCallback(SCHEDULE)]).fit(Plain(), loader())


def test_fabric_s_optimizers_raise_second_moments(tmp_path):
    """Oracle: the same loop without Fabric."""
    lightning = pytest.importorskip("lightning_fabric")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    found = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        model = net
        if wrapped:
            model, optimizer = fabric.setup(net, optimizer)
        pruner = Pruner(net, SCHEDULE, optimizer)
        for step in range(12):
            x, y = Tasks(12)[step]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            pruner.step()
        found.append({name: value.clone() for name, value in net.state_dict().items()})
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def test_the_other_lightning_package_takes_it_too(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Other(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        training_step, configure_optimizers = Plain.training_step, Plain.configure_optimizers

    pruning = PruningCallback(SCHEDULE)
    lightning.Trainer(
        default_root_dir=tmp_path,
        callbacks=[pruning],
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Other(), loader())
    assert pruning.pruner.iteration == 12


DDP = """
import sys, torch
sys.path.insert(0, {root!r})
import pytorch_lightning as pl
from tests.hosts.test_lightning import Plain, SCHEDULE, loader
from l2l_prune.integrations.lightning import PruningCallback
pl.seed_everything(0)
module, pruning = Plain(), PruningCallback(SCHEDULE)
fit = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    use_distributed_sampler=False)
fit.callbacks.append(pruning)
fit.fit(module, loader())
torch.save((pruning.pruner.masks, module.state_dict()), f"{folder}/{{fit.global_rank}}.pt")
"""


def of_both_ranks(code, folder):
    """What each of two processes that run ``code`` saves."""
    script, root = folder / "script.py", str(Path(__file__).parents[2])
    script.write_text(code.format(root=root, folder=str(folder)))
    subprocess.run([sys.executable, "-W", "ignore", str(script)], check=True, timeout=300)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.process
@pytest.mark.slow
def test_ddp_on_two_processes(tmp_path):
    (masks, state), (other_masks, other) = of_both_ranks(DDP, tmp_path)
    assert all(torch.equal(state[k], other[k]) for k in state)
    assert all(torch.equal(masks[k], other_masks[k]) for k in masks)
    assert sum(int((~m).sum()) for m in masks.values()) > 0


TASKS = """
import os, sys, torch
sys.path.insert(0, {root!r})
import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from l2l_prune import DSDSchedule, TaskMasks
from l2l_prune.masking import random
from tests.hosts.test_lightning import Plain, loader
from l2l_prune.integrations.lightning import PruningCallback

class Watch(pl.Callback):
    def on_before_zero_grad(self, trainer, module, optimizer):
        self.seen.append(module.net.head.weight_mask.clone())

def fit(schedule, broadcast=False, **options):
    pl.seed_everything(0)
    callbacks = [PruningCallback(schedule, **options), Watch()]
    callbacks[1].seen = []
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2,
        strategy=DDPStrategy(broadcast_buffers=broadcast), logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False)
    trainer.fit(Plain(), loader())
    return trainer.global_rank, callbacks[1].seen, callbacks[0].pruner

per_task = DSDSchedule(0.5, pretrain=0, prune=12, retrain=0).per_task()
masks = lambda: TaskMasks(torch.Generator().manual_seed(0))
rank, tasks, _ = fit(per_task, task_masks=masks())
own = int(os.environ.get("LOCAL_RANK", 0))
criterion = random(torch.Generator().manual_seed(own))
_, _, pruner = fit(DSDSchedule(0.5, pretrain=2, prune=10, retrain=0), criterion=criterion)
refused = ""
try:
    fit(per_task, broadcast=True, task_masks=masks())
except ValueError as error:
    refused = str(error)
torch.save((tasks, pruner.masks, refused), f"{folder}/{{rank}}.pt")
"""


@pytest.mark.process
@pytest.mark.slow
def test_ddp_gives_ranks_task_masks_of_their_own_and_one_choice_of_weights(tmp_path):
    (tasks, chosen, refused), (other_tasks, other_chosen, other_refused) = of_both_ranks(
        TASKS, tmp_path
    )
    pairs = list(zip(tasks, other_tasks, strict=True))
    assert sum(not torch.equal(a, b) for a, b in pairs) > len(pairs) / 2
    assert all(torch.equal(chosen[name], other_chosen[name]) for name in chosen)
    assert sum(int((~mask).sum()) for mask in chosen.values()) > 0
    assert "broadcast_buffers=False" in refused
    assert "broadcast_buffers=False" in other_refused


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tried on forked processes")
@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_killed_fits_end_as_if_they_never_were(name):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hosts.lightning_kills", name, "6"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_is_a_task_with_masks_of_its_own(tmp_path, name, accumulate):
    """Masks in the forward of each training batch, none in the weights that are kept."""
    seen = []

    class Look(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            pruner = pruning.pruner
            seen.append({n: m.clone() for n, m in pruner.learner_masks.items()})
            gradients = {n: w.grad for n, w in pruner.weights.items()}
            if accumulate == 1:
                for tensor, mask in seen[-1].items():
                    assert (gradients[tensor][~mask] == 0).all()

    schedule = Schedule((Segment(1), Segment(5, sparse=True, sparsity=0.5, masks="task")))
    draws = TaskMasks(torch.Generator().manual_seed(0))
    pruning = PruningCallback(schedule, task_masks=draws)
    module = MODULES[name]()
    trainer(
        tmp_path, [pruning, Look()], accumulate_grad_batches=accumulate, limit_val_batches=1
    ).fit(module, loader(6 * accumulate), loader(1))
    assert len(seen) == 6 * accumulate
    assert not any(seen[:accumulate])
    first = next(iter(pruning.pruner.masks))
    drawn = [masks[first].flatten().tolist() for masks in seen[accumulate:]]
    assert len({str(mask) for mask in drawn}) > 1
    assert all(sum(mask) == len(mask) - round(len(mask) / 2) for mask in drawn)
    assert all(bool(mask.all()) for mask in pruning.pruner.masks.values())
    assert pruning.pruner.iteration == 6
    pruning.pruner.finalize()


class Looking(pl.Callback):
    """Copies the module in the middle of a fit, and counts its zeros after each batch."""

    def __init__(self):
        self.copied, self.zeros = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.zeros.append(int((module.net.head.weight == 0).sum()))
        try:
            twin = copy.deepcopy(module.net)
            self.copied.append(int((twin.head.weight == 0).sum()))
        except RuntimeError as error:
            self.copied.append(str(error))


@pytest.mark.parametrize("callback", ["ModelPruning", "PruningCallback"])
def test_beside_lightnings_model_pruning(tmp_path, callback):
    """Half of 48 weights pruned from the fourth step on: copies, checkpoints, resuming, metrics."""
    schedule = Schedule((Segment(3), Segment(9, sparse=True, sparsity=0.5)))

    def pruning(module):
        if callback == "PruningCallback":
            return PruningCallback(schedule, only="net.head.weight")
        return pl.callbacks.ModelPruning(
            "l1_unstructured",
            amount=0.5,
            parameters_to_prune=[(module.net.head, "weight")],
            use_global_unstructured=False,
            use_lottery_ticket_hypothesis=False,
            apply_pruning=lambda epoch: epoch == 2,  # at the end of the third
        )

    torch.manual_seed(0)
    first, looking = Plain(), Looking()
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    begun = trainer(
        tmp_path, [pruning(first), looking, saving], epochs=6, enable_checkpointing=True
    )
    begun.fit(first, loader(1))
    assert looking.zeros[-1] == 24
    again, resumed_looking = Plain(), Looking()
    resumed = trainer(tmp_path, [pruning(again), resumed_looking], epochs=9)
    resumed.fit(again, loader(1), ckpt_path=tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    if callback == "PruningCallback":
        assert looking.copied[-1] == 24
        assert float(begun.callback_metrics["pruning/sparsity"]) == 0.5
        assert (state["net.head.weight_mask"] == 0).sum() == 24
        assert resumed_looking.zeros == [24, 24, 24]
    else:  # what Lightning's own callback does not keep
        assert "deepcopy protocol" in looking.copied[-1]
        assert not begun.callback_metrics
        assert "net.head.weight_mask" not in state
        assert resumed_looking.zeros == [0, 0, 0]  # the first step after it moved all weights
