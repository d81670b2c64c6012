"""Apply the diffs of docs/guides/ to checkouts of public scripts, and run those on tiny data.

``python tests/peers/published.py --cavia DIR --metaoptnet DIR --libfewshot DIR`` with clones of
lmzintgraf/cavia, kjunelee/MetaOptNet and RL-VIG/LibFewShot; the checkouts themselves stay as they
are.
"""

from __future__ import annotations

import argparse
import csv
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from l2l_prune.fewshot.data import Glyphs

GUIDES = Path(__file__).parents[2] / "docs" / "guides"

CPU_PRELUDE = """
import random, runpy, sys, types
import torch
import torchvision.transforms as transforms
from torch.utils.data import DataLoader, Dataset

# A GPU program on a CPU.
torch.Tensor.cuda = lambda self, *args, **kwargs: self
torch.nn.Module.cuda = lambda self, *args, **kwargs: self

# random.sample took sets until Python 3.11.
sample = random.sample
random.sample = lambda population, k: sample(list(population), k)

# Small images: the program pads and crops to 84x84.
crop = transforms.RandomCrop
transforms.RandomCrop = lambda size, padding: crop(28, padding=2)


class ListDataset(Dataset):
    def __init__(self, elem_list, load):
        self.elem_list, self.load = list(elem_list), load

    def __len__(self):
        return len(self.elem_list)

    def __getitem__(self, index):
        return self.load(self.elem_list[index])

    def parallel(self, batch_size, num_workers, shuffle):
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle)


dataset = types.SimpleNamespace(ListDataset=ListDataset)
sys.modules["torchnet"] = types.SimpleNamespace(dataset=dataset)
sys.modules["h5py"] = types.ModuleType("h5py")
import data.mini_imagenet
data.mini_imagenet._MINI_IMAGENET_DATASET_DIR = "tiny"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


LIBFEWSHOT_PRELUDE = """
import collections, collections.abc, sys
import torch

# A GPU program on a CPU, with a newer Python and torch.
collections.Iterable = collections.abc.Iterable
torch.utils.data.Sampler.__init__ = lambda self, data_source=None: None  # torch dropped it
torch.Tensor.cuda = lambda self, *args, **kwargs: self
torch.cuda.set_device = lambda device: None
to = torch.nn.Module.to
torch.nn.Module.to = lambda self, device: to(self, "cpu" if device == 0 else device)

from core import Trainer
from core.config import Config
from l2l_prune import Pruner

counts = []
step = Pruner.step


def watched(pruner):
    step(pruner)
    for name, mask in pruner.masks.items():
        path, _, weight = name.rpartition(".")
        pruned = getattr(pruner.model.get_submodule(path), weight)[~mask]
        assert (pruned == 0).all(), name
    counts.append(pruner.sparsity)


Pruner.step = watched
name, sys.argv = sys.argv[1], sys.argv[:1]
small = {
    "data_root": "tiny", "epoch": 2, "train_episode": 5, "test_episode": 2, "episode_size": 1,
    "query_num": 2, "workers": 0, "n_gpu": 1, "device_ids": "0", "pretrain_path": None,
    "log_name": name.replace("/", "-"), "augment": False,
}
config = Config(name, small).get_config_dict()
if "inner_param" in (config["classifier"]["kwargs"] or {}):
    config["classifier"]["kwargs"]["inner_param"] |= {"train_iter": 2, "test_iter": 2}
trainer = Trainer(0, config)
trainer.train_loop(0)
assert trainer.pruner.iteration == trainer.pruner.schedule.iterations == len(counts) == 10
assert max(counts) > 0.29, counts
assert counts[-1] == 0, counts
saved = torch.load(trainer.checkpoints_path + "/model_last.pth", weights_only=False)["model"]
plain = Trainer._init_model(trainer, config)[0]
plain.load_state_dict(saved)
sys.stdout.write(f"{name}: sparsity after each step {[round(s, 2) for s in counts]}\\n")
"""


def patched(checkout: Path, guide: str, scratch: Path) -> Path:
    """A copy of the checkout with every diff of a guide applied."""
    work = scratch / guide
    shutil.copytree(checkout, work, ignore=shutil.ignore_patterns(".git"))
    blocks = re.findall(r"```diff\n(.*?)```", (GUIDES / f"{guide}.md").read_text(), re.DOTALL)
    for block in blocks:
        added = [line for line in block.splitlines() if re.match(r"\+(?!\+\+)", line)]
        assert len(added) <= 3, added
        subprocess.run(
            ["git", "apply", "--unidiff-zero", "-"], cwd=work, input=block, text=True, check=True
        )
    return work


def run(*command: str | Path, cwd: Path) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=cwd, check=True)


def cavia(checkout: Path, scratch: Path) -> None:
    work = patched(checkout, "cavia", scratch)
    small = ("--n_iter", "300", "--tasks_per_metaupdate", "5")
    run(sys.executable, "main.py", *small, cwd=work / "regression")
    write_jpegs(work / "classification" / "tiny")
    small = ("--n_iter", "20", "--tasks_per_metaupdate", "2", "--k_query", "3", "--imsize", "28")
    command = (sys.executable, "main.py", *small, "--num_filters", "8", "--data_path", "tiny")
    run(*command, cwd=work / "classification")
    saved = [p for p in (work / "classification" / "result_files").iterdir() if not p.suffix]
    sys.path.insert(0, str(work / "classification"))  # the pickle names the scripts' module
    model = torch.load(saved[0], weights_only=False)
    print("unpickled", type(model).__name__, [key for key in model.state_dict() if "conv1" in key])


def write_jpegs(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "images_preprocessed").mkdir()
    for mode, split in (("train", "train"), ("val", "test")):
        glyphs = Glyphs(split, max_classes=8)
        with (folder / f"{mode}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("filename", "label"))
            for number, (image, label) in enumerate(
                zip(glyphs.images, glyphs.labels.tolist(), strict=True)
            ):
                label_name = f"{mode:5}{label:04d}".replace(" ", "-")
                name = f"{label_name}{number:08d}.jpg"  # the script cuts the label out of it
                Image.fromarray(image[0].numpy()).save(folder / "images" / name)
                rows.writerow((name, label_name))


def metaoptnet(checkout: Path, scratch: Path) -> None:
    work = patched(checkout, "metaoptnet", scratch)
    tiny = work / "tiny"
    tiny.mkdir()
    for file, split, first in (
        ("train_phase_train", "train", 0),
        ("train_phase_val", "train", 0),
        ("train_phase_test", "train", 0),
        ("val", "test", 100),
        ("test", "test", 100),
    ):
        glyphs = Glyphs(split, max_classes=8)
        images = glyphs.images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        labels = [first + label for label in glyphs.labels.tolist()]
        with (tiny / f"miniImageNet_category_split_{file}.pickle").open("wb") as f:
            pickle.dump({"data": np.ascontiguousarray(images), "labels": labels}, f)
    (work / "prelude.py").write_text(CPU_PRELUDE)
    small = "--num-epoch 1 --train-shot 1 --train-query 2 --val-episode 20 --val-query 3"
    small += " --val-shot 1 --episodes-per-batch 1 --network ProtoNet --head SVM --eps 0.1"
    (work / "experiments").mkdir()
    run(sys.executable, "prelude.py", "train.py", *small.split(), cwd=work)
    small = "--load experiments/exp_1/best_model.pth --episode 50 --shot 1 --query 3"
    command = (sys.executable, "prelude.py", "test.py", *small.split())
    run(*command, "--network", "ProtoNet", "--head", "SVM", cwd=work)


def libfewshot(checkout: Path, scratch: Path) -> None:
    work = patched(checkout, "libfewshot", scratch)
    write_jpegs(work / "tiny")
    shutil.copy(work / "tiny" / "val.csv", work / "tiny" / "test.csv")
    (work / "prelude.py").write_text(LIBFEWSHOT_PRELUDE)
    baseline = "reproduce/MetaBaseline/MetaBaseline-miniImageNet--ravi-resnet12-5-1.yaml"
    for config in ("config/maml.yaml", "config/anil.yaml", baseline):
        run(sys.executable, "prelude.py", config, cwd=work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cavia", type=Path, help="clone of lmzintgraf/cavia")
    parser.add_argument("--metaoptnet", type=Path, help="clone of kjunelee/MetaOptNet")
    parser.add_argument("--libfewshot", type=Path, help="clone of RL-VIG/LibFewShot")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.cavia:
            cavia(options.cavia, Path(folder))
        if options.metaoptnet:
            metaoptnet(options.metaoptnet, Path(folder))
        if options.libfewshot:
            libfewshot(options.libfewshot, Path(folder))
