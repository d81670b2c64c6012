"""Tiny files of every benchmark in the formats that learn2learn reads.

Pixels tell the class (red, or the whole of a grey image) and the example (green).
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test")
SHORT = {"train": "train", "validation": "val", "test": "test"}


def coloured(labels, size):
    images = np.zeros((len(labels), size, size, 3), dtype=np.uint8)
    images[..., 0] = (10 * labels)[:, None, None]
    images[..., 1] = np.arange(len(labels))[:, None, None]
    images[:, 0, 1, 2] = 255  # row 0, column 1, blue
    return images


def shuffled(number, classes, each):
    return np.random.default_rng(number).permutation(np.repeat(np.arange(classes), each))


def write_mini_imagenet(folder, classes=6, each=4):
    for number, split in enumerate(SPLITS):
        labels = shuffled(number, classes, each)
        names = {f"n{c:08d}": np.flatnonzero(labels == c).tolist() for c in range(classes)}
        with (folder / f"mini-imagenet-cache-{split}.pkl").open("wb") as file:
            pickle.dump({"image_data": coloured(labels, 84), "class_dict": names}, file)


def write_tiered_imagenet(folder, classes=6, each=4):
    (folder / "tiered-imagenet").mkdir()
    for number, split in enumerate(SPLITS):
        labels = shuffled(number, classes, each)
        pngs = []
        for image in coloured(labels, 84):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            pngs.append(buffer.getvalue())
        stem = folder / "tiered-imagenet" / SHORT[split]
        with open(f"{stem}_images_png.pkl", "wb") as file:
            pickle.dump(pngs, file)
        with open(f"{stem}_labels.pkl", "wb") as file:
            pickle.dump({"label_specific": labels, "label_general": labels // 2}, file)


def write_fc100(folder, classes=6, each=4):
    for number, split in enumerate(SPLITS):
        labels = shuffled(number, classes, each)
        with (folder / f"FC100_{SHORT[split]}.pickle").open("wb") as file:
            pickle.dump({"data": coloured(labels, 32), "labels": labels.tolist()}, file)


def write_cifar_fs(folder, classes=6, each=4):
    base = folder / "cifarfs" / "cifar100"
    (base / "splits" / "bertinetto").mkdir(parents=True)
    for split in SPLITS:
        names = [f"{SHORT[split]}_{number}" for number in range(classes)]
        (base / "splits" / "bertinetto" / f"{SHORT[split]}.txt").write_text("\n".join(names) + "\n")
        labels = np.repeat(np.arange(classes), each)
        for number, (image, label) in enumerate(zip(coloured(labels, 32), labels, strict=True)):
            place = base / "data" / names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:03d}.png")


def write_omniglot(folder, monkeypatch, alphabets=3, characters=5, each=4):
    """105x105, ink 0 on 1; learn2learn checks the archives' MD5, which a fake cannot have."""
    from torchvision.datasets import Omniglot

    root = folder / "omniglot-py"
    sums = {}
    for part in ("images_background", "images_evaluation"):
        for alphabet in range(alphabets):
            for character in range(characters):
                place = root / part / f"{part[7:10]}{alphabet}" / f"character{character:02d}"
                place.mkdir(parents=True)
                for number in range(each):
                    image = np.full((105, 105), 255, dtype=np.uint8)
                    image[: 15 * (character + 1), :35] = 0
                    image[:35, 70:] = 255 * (alphabet % 2)
                    Image.fromarray(image).convert("1").save(place / f"{number:04d}.png")
        archive = root / f"{part}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(part, "")
        sums[part] = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(Omniglot, "zips_md5", sums)
