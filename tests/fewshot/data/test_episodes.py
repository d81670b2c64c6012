from __future__ import annotations

import pytest
import torch

from l2l_prune.fewshot.data import EpisodeSampler, minibatches

SIZES = (5, 9, 6, 12)


@pytest.fixture
def data():
    """Every image tells its own index; labels are shuffled and not consecutive."""
    labels = torch.cat([torch.full((n,), 10 * c) for c, n in enumerate(SIZES)])
    labels = labels[torch.randperm(len(labels))]
    images = torch.arange(len(labels)).float().view(-1, 1, 1, 1)
    return images, labels


def sampler(data, **options):
    return EpisodeSampler(*data, **{"ways": 3, "shots": 2, "queries": 3, "seed": 0, **options})


def test_episodes_are_right(data):
    _, labels = data
    source = sampler(data)
    for _ in range(200):
        episode = source.sample()
        assert episode.support_x.shape == (6, 1, 1, 1)
        support, query = episode.support_x.flatten().long(), episode.query_x.flatten().long()
        indices = torch.cat([support, query])
        assert len(indices.unique()) == 15  # without replacement, support and query disjoint
        classes = []
        for way in range(3):
            of_way = torch.cat([support[episode.support_y == way], query[episode.query_y == way]])
            assert len(of_way) == 5
            (only,) = labels[of_way].unique().tolist()
            classes.append(only)
        assert len(set(classes)) == 3


def test_classes_and_examples_are_drawn_uniformly(data):
    _, labels = data
    source = sampler(data, ways=2, shots=1, queries=0)
    draws = torch.cat([source.sample().support_x.flatten().long() for _ in range(4000)])
    counts = draws.bincount(minlength=len(labels)).double()
    for c, size in enumerate(SIZES):
        of_class = counts[labels == 10 * c]
        expected = 8000 / 4 / size
        # Chi-square of `size` cells: mean size - 1, standard deviation sqrt(2 (size - 1)).
        chi2 = float(((of_class - expected) ** 2 / expected).sum())
        assert chi2 < size + 5 * (2 * size) ** 0.5


def test_order_of_classes_is_random(data):
    _, labels = data
    source = sampler(data, ways=4, shots=1, queries=0)
    first = {int(labels[int(source.sample().support_x[0])]) for _ in range(100)}
    assert first == {0, 10, 20, 30}


def test_all_examples_of_the_smallest_class_can_be_used(data):
    episode = sampler(data, ways=4, shots=5, queries=0).sample()
    assert len(episode.support_y) == 20
    assert episode.query_x.shape == (0, 1, 1, 1)


def test_bytes_are_scaled():
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).view(4, 1, 1, 1)
    source = EpisodeSampler(images, torch.tensor([0, 0, 1, 1]), ways=2, shots=2, queries=0)
    values = source.sample().support_x.flatten().sort().values
    assert torch.allclose(values, torch.tensor([0.0, 0.2, 0.4, 1.0]))


def test_seed_and_state(data):
    a, b = sampler(data), sampler(data)
    a.sample(), b.sample()
    state = a.state_dict()
    expected = [a.sample().support_x for _ in range(3)]
    assert torch.equal(b.sample().support_x, expected[0])
    c = sampler(data, seed=5)
    c.load_state_dict(state)
    for x, episode in zip(expected, c, strict=False):
        assert torch.equal(x, episode.support_x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 0}, "ways"),
        ({"shots": 0}, "shots"),
        ({"queries": -1}, "queries"),
        ({"ways": 5}, "ways=5.*4 classes"),
        ({"shots": 4, "queries": 2}, "shots . queries = 6.*class 0 has only 5"),
    ],
)
def test_bad_input(data, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(data, **options)
    with pytest.raises(ValueError, match="labels"):
        EpisodeSampler(data[0], data[1][:-1], ways=2, shots=1, queries=1)


def test_minibatches_use_every_example_once_a_pass():
    x, y = torch.arange(7.0), torch.arange(7)
    batches = list(minibatches(x, y, batch_size=3, steps=7, generator=torch.Generator()))
    assert [len(b) for b, _ in batches] == [3] * 7
    drawn = torch.cat([b for b, _ in batches])
    for start in (0, 7, 14):
        assert sorted(drawn[start : start + 7].tolist()) == list(range(7))
    assert all(torch.equal(a.long(), b) for a, b in batches)


def test_minibatches_larger_than_the_task_and_none_at_all():
    x, y = torch.arange(2.0), torch.arange(2)
    ((batch, _),) = minibatches(x, y, batch_size=5, steps=1)
    assert sorted(batch.tolist())[:2] == [0, 0]
    assert list(minibatches(x, y, batch_size=5, steps=0)) == []


@pytest.mark.parametrize(
    ("n", "m", "batch_size", "steps"), [(0, 0, 1, 1), (2, 3, 1, 1), (2, 2, 0, 1), (2, 2, 1, -1)]
)
def test_bad_minibatches(n, m, batch_size, steps):
    with pytest.raises(ValueError, match=r"x and y|batch_size|steps"):
        list(minibatches(torch.zeros(n), torch.zeros(m), batch_size=batch_size, steps=steps))


def test_label_noise_replaces_labels_by_other_classes_of_the_task():
    images = torch.arange(40.0).reshape(40, 1, 1, 1)
    labels = torch.arange(4).repeat_interleave(10)
    options = {"ways": 4, "shots": 5, "queries": 5, "seed": 3}
    sampler = EpisodeSampler(images, labels, label_noise=0.4, **options)
    counts = torch.zeros(4, 4)
    for _ in range(500):
        episode = sampler.sample()
        x = torch.cat([episode.support_x, episode.query_x]).flatten()
        true = torch.arange(4).repeat_interleave(5).repeat(2)
        by_image = torch.div(x, 10, rounding_mode="floor").long().reshape(2, 4, 5)
        assert (by_image == by_image[:, :, :1]).all()  # the images stay with their class
        told = torch.cat([episode.support_y, episode.query_y])
        counts += torch.zeros(16).index_add_(0, 4 * true + told, torch.ones(40)).reshape(4, 4)
    shares = counts / counts.sum(1, keepdim=True)
    expected = torch.full((4, 4), 0.4 / 3) + torch.eye(4) * (0.6 - 0.4 / 3)
    assert torch.allclose(shares, expected, atol=0.015)
    clean, plain = (EpisodeSampler(images, labels, label_noise=0.0, **options) for _ in range(2))
    assert torch.equal(clean.sample().support_x, plain.sample().support_x)
    with pytest.raises(ValueError, match="label_noise"):
        EpisodeSampler(images, labels, label_noise=0.5, ways=1, shots=1, queries=1)


def test_episodes_are_where_the_images_are():
    """The "meta" device stands in for a GPU; episodes are drawn on the CPU all the same."""
    images, labels = torch.zeros(20, 1, 4, 4, device="meta"), torch.arange(4).repeat(5)
    sampler = EpisodeSampler(images, labels, ways=3, shots=1, queries=2, label_noise=0.5)
    assert {tensor.device.type for tensor in sampler.sample()} == {"meta"}
