from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from l2l_prune.fewshot.data import Glyphs, glyphs_tasksets
from l2l_prune.fewshot.data.glyphs import contact_sheet

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module", autouse=True)
def _render_once(glyph_cache):
    Glyphs("train")


@pytest.mark.parametrize("split_by", ["script", "random"])
def test_splits_are_disjoint_and_cover_everything(split_by):
    parts = [set(Glyphs(split, split_by=split_by).classes) for split in SPLITS]
    assert len(set.union(*parts)) == sum(len(part) for part in parts)
    assert 500 < sum(len(part) for part in parts) < 700


def test_scripts_are_those_of_unicode():
    for split, names in {
        "validation": {"GREEK"},
        "test": {"CYRILLIC", "ARMENIAN", "GEORGIAN"},
    }.items():
        found = {unicodedata.name(c).split()[0] for c in Glyphs(split).classes}
        assert found == names


def test_items_and_arrays_agree():
    data = Glyphs("test", transform=lambda image: image * 2, target_transform=lambda y: -y)
    assert data.images.shape == (20 * len(data.classes), 1, 28, 28)
    image, label = data[45]
    assert label == -2
    assert torch.equal(image, data.images[45].float() / 255 * 2)
    assert data.labels[45] == 2
    assert len(data) == len(data.labels) == 20 * len(data.classes) == 20 * len(data.scripts)


def test_the_pixels_at_28_are_those_of_the_first_version():
    import matplotlib
    import PIL

    if (matplotlib.__version__, PIL.__version__) != ("3.11.2", "13.0.0"):
        pytest.skip("other versions of Pillow and matplotlib draw other pixels")
    images = render_once().images
    assert hashlib.sha256(images.tobytes()).hexdigest() == (
        "db261ee4ceadd5ced1474378002fa6b91cc91ff27d445529747cdbd21f42bedb"
    )


def test_other_sizes_show_the_same_drawings(tmp_path):
    known = Glyphs("validation")
    other = Glyphs("validation", size=16, root=tmp_path)
    assert other.classes == known.classes
    assert torch.equal(other.labels, known.labels)
    assert other.images.shape == (len(known), 1, 16, 16)
    small = torch.nn.functional.interpolate(known.images.float(), size=16, mode="area")
    apart = (other.images - small).abs().flatten(1).mean(1)
    mixed = (other.images - small.roll(20, 0)).abs().flatten(1).mean(1)
    assert apart.mean() < 0.25 * mixed.mean()
    assert (apart < mixed).float().mean() > 0.99
    with pytest.raises(ValueError, match=r"size must be in \[16, 128\], got 200"):
        Glyphs("validation", size=200)


def test_every_image_has_ink_within_its_borders():
    for split in SPLITS:
        images = Glyphs(split).images.float()
        assert (images.amax((1, 2, 3)) > 150).all()
        border = torch.cat([images[..., 0, :], images[..., -1, :]], -1).mean()
        assert border < 5  # hardly ever cut off


def test_instances_of_a_class_differ_yet_belong_together():
    data = Glyphs("train")
    images = data.images.view(-1, 20, 784).float()
    for rows in images:
        assert len({row.numpy().tobytes() for row in rows}) == 20
    # 1-nearest-neighbour on pixels, 5-way 1-shot: far above chance, far from solved.
    generator = torch.Generator().manual_seed(0)
    right = []
    for _ in range(300):
        classes = torch.randperm(len(images), generator=generator)[:5]
        a, b = torch.randperm(20, generator=generator)[:2]
        nearest = torch.cdist(images[classes, b], images[classes, a]).argmin(1)
        right.append((nearest == torch.arange(5)).float().mean())
    assert 0.4 < float(torch.stack(right).mean()) < 0.8


def test_no_two_classes_are_the_same_drawing():
    """Independent of the renderer's own measure: mean images of the classes, by correlation."""
    means = torch.cat([Glyphs(s).images.view(-1, 20, 784).float().mean(1) for s in SPLITS])
    correlation = np.corrcoef(means.numpy())
    np.fill_diagonal(correlation, 0)
    assert correlation.max() < 0.99
    for pair in ("A\u0391", "A\u0410", "o\u03bf", "x\u0445"):  # Greek and Cyrillic homoglyphs
        every = {c for split in SPLITS for c in Glyphs(split).classes}
        assert not set(pair) <= every


def test_max_classes_is_a_seeded_draw():
    a, b = Glyphs(max_classes=30), Glyphs(max_classes=30)
    assert a.classes == b.classes
    assert len(a.classes) == 30
    assert set(a.labels.tolist()) == set(range(30))
    assert Glyphs(max_classes=30, seed=1).classes != a.classes
    assert set(a.classes) <= set(Glyphs().classes)


@pytest.mark.parametrize(
    ("options", "culprit", "error"),
    [
        ({"split": "valid"}, "split", ValueError),
        ({"split_by": "alphabet"}, "split_by", ValueError),
        ({"max_classes": 0}, "max_classes", ValueError),
        ({"max_classes": 10_000}, "max_classes", ValueError),
        ({"max_classes": 2.5}, "max_classes", TypeError),
        ({"max_classes": True}, "max_classes", TypeError),
    ],
)
def test_bad_input(options, culprit, error):
    with pytest.raises(error, match=culprit):
        Glyphs(**options)


def cached_file():
    """That of 28x28 pixels: names of others end in their size."""
    paths = Path(os.environ["L2L_PRUNE_CACHE"]).glob("*.npz")
    return min(paths, key=lambda path: len(path.name))


def digest(glyphs):
    return hashlib.sha256(glyphs.images.numpy().tobytes()).hexdigest()


def test_rendering_is_deterministic_and_damage_is_mended(tmp_path, monkeypatch):
    before, known = digest(Glyphs("train")), render_once()
    whole, file = cached_file().read_bytes(), tmp_path / cached_file().name
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1000] + bytes(1000)):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="rendering it again"):
            assert digest(Glyphs("train", root=tmp_path)) == before
        assert digest(Glyphs("train", root=tmp_path)) == before  # without a warning
        # Rendered once, which takes a while: the other damage is mended with what is known.
        monkeypatch.setattr("l2l_prune.fewshot.data.glyphs.render_glyphs", lambda *_: known)


@pytest.mark.parametrize("spoil", ["dtype", "scripts", "versions"])
def test_a_file_with_the_wrong_content_is_not_trusted(tmp_path, monkeypatch, spoil):
    with np.load(cached_file()) as file:
        content = dict(file)
    if spoil == "dtype":
        content["images"] = content["images"].astype(np.float32)
    else:
        content[spoil] = content[spoil][:-1] if spoil == "scripts" else np.array("{}")
    np.savez(tmp_path / cached_file().name, **content)
    monkeypatch.setattr(
        "l2l_prune.fewshot.data.glyphs.render_glyphs",
        lambda *_: pytest.fail("rendered", pytrace=False),
    )
    with (
        pytest.warns(UserWarning, match="unexpected content"),
        pytest.raises(BaseException, match="rendered"),
    ):
        Glyphs("train", root=tmp_path)


def test_an_unwritable_folder_only_warns(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    small = render_once()
    monkeypatch.setattr("l2l_prune.fewshot.data.glyphs.render_glyphs", lambda *_: small)
    with pytest.warns(UserWarning, match="cannot be cached"):
        assert len(Glyphs("train", root=tmp_path / "file" / "below")) > 0


def render_once():
    from l2l_prune.fewshot.data.glyphs import _load

    return _load(None)


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    """Both start without a cache; one renders, the other waits, both see the same."""
    code = (
        "import hashlib; from l2l_prune.fewshot.data import Glyphs;"
        "print(hashlib.sha256(Glyphs('train').images.numpy().tobytes()).hexdigest())"
    )
    environment = {**os.environ, "L2L_PRUNE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    digests = {run.communicate(timeout=300)[0].decode().strip() for run in runs}
    assert digests == {digest(Glyphs("train"))}
    assert [p.suffix for p in tmp_path.iterdir() if p.suffix != ".lock"] == [".npz"]


def test_contact_sheet_shows_the_pixels(tmp_path):
    from PIL import Image

    data = Glyphs("validation")
    contact_sheet(data, tmp_path / "sheet.png", classes=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").resize((560, 84), Image.NEAREST))
    assert np.abs(255 - sheet[:28, :28].astype(int) - data.images[0, 0].numpy()).mean() < 25


def test_learn2learn_tasksets():
    pytest.importorskip("learn2learn")
    tasksets = glyphs_tasksets(train_ways=4, train_samples=6, test_samples=3, max_classes=10)
    images, labels = tasksets.train.sample()
    assert images.shape == (24, 1, 28, 28)
    assert labels.bincount().tolist() == [6] * 4
    allowed = {row.numpy().tobytes() for row in Glyphs(max_classes=10).images.float() / 255}
    assert {image.numpy().tobytes() for image in images} <= allowed
    images, labels = tasksets.test[0]
    assert labels.bincount().tolist() == [3] * 5
