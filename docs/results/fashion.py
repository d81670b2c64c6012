"""Class folders of Fashion-MNIST from Debian's package dataset-fashion-mnist.

python docs/results/fashion.py fashion
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
NAMES = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
]
EACH = 600


def write_folders(out: Path, source: Path = SOURCE) -> None:
    """Write the first pictures of each class in the training file to ``out/class/number.png``."""
    with gzip.open(source / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(source / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    for label, name in enumerate(NAMES):
        (out / name).mkdir(parents=True)
        for number, row in enumerate(np.flatnonzero(labels == label)[:EACH]):
            Image.fromarray(images[row]).save(out / name / f"{number:04d}.png")


if __name__ == "__main__":
    write_folders(Path(sys.argv[1]), *map(Path, sys.argv[2:]))
