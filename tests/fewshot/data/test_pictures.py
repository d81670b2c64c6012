from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from l2l_prune.fewshot.data import load_pictures


def write(path, array):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path)


def test_colour_and_grey_in_the_order_of_names(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    write(tmp_path / "b" / "wide.png", array)
    write(tmp_path / "a.PNG", array[:, 2:8])
    (tmp_path / "notes.txt").write_text("no picture")
    square = torch.from_numpy(array[:, 2:8]).permute(2, 0, 1)
    pictures = load_pictures(tmp_path, 6)
    assert pictures.shape == (2, 3, 6, 6)
    assert torch.equal(pictures[0], square)  # nothing to resample
    assert torch.equal(pictures[1], square)  # the margins of the wide one are cut off
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = load_pictures(tmp_path, 6, grey=True)
    assert grey.shape == (2, 1, 6, 6)
    torch.testing.assert_close(grey[0].float(), (weights * square).sum(0, True), atol=1, rtol=0)


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    write(tmp_path / "a.png", np.full((6, 6), 9, np.uint8))
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves beside it")
    (tmp_path / "b.png").mkdir()
    write(tmp_path / ".thumbnails" / "a.png", np.full((6, 6), 9, np.uint8))
    assert len(load_pictures(tmp_path, 6)) == 1


def test_other_sizes_are_resampled(tmp_path):
    write(tmp_path / "flat.jpg", np.full((50, 40), 200, np.uint8))
    assert (load_pictures(tmp_path, 16).int() - 200).abs().max() <= 2


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        load_pictures(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no pictures .* under"):
        load_pictures(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        load_pictures(tmp_path)
    (tmp_path / "broken.png").unlink()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"link\.png"):
        load_pictures(tmp_path)
    with pytest.raises(ValueError, match="size must be >= 1"):
        load_pictures(tmp_path, 0)
