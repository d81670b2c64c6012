"""What adapting costs, against counts by hand; nothing here depends on how fast a machine is."""

from __future__ import annotations

import csv

import pytest
import torch

from l2l_prune import DSDSchedule, PrunedReptile
from l2l_prune.channels import Structured
from l2l_prune.experiments.report.adaptation import (
    adaptation_section,
    read_adaptation,
    write_adaptation,
)
from l2l_prune.experiments.report.pareto import pareto_front
from l2l_prune.fewshot import Conv4, Episode, Mean
from l2l_prune.shipping import Adapting, adaptation_costs, costs_table, export

pytest.importorskip("safetensors")

STEPS, BATCH, QUERIES, WAYS = 3, 4, 10, 5


def learner(rate=0.0, structured=None):
    dense = 9 * (rate == 0)
    schedule = DSDSchedule(rate or 0.5, pretrain=dense, prune=9 - dense, retrain=0)
    return PrunedReptile(Conv4(WAYS, 8), schedule, structured=structured)


def episode():
    x, y = torch.rand(WAYS, 1, 28, 28), torch.arange(WAYS)
    return Episode(x, y, torch.rand(QUERIES, 1, 28, 28), torch.arange(QUERIES) % WAYS)


def macs(channels):
    """Of the forward pass of an image, layer by layer; 28, 14, 7, 4, 2 pixels wide."""
    first, *others = (9 * side**2 * channels for side in (14, 7, 4, 2))
    return [first, *(other * channels for other in others), channels * 4 * WAYS]


def measured(ways):
    return adaptation_costs(ways, episode(), steps=STEPS, batch_size=BATCH, rounds=1)


def test_operations_are_those_counted_by_hand():
    reptile = learner()
    found = measured({"all": Adapting(reptile), "head": Adapting(reptile, "classifier")})
    forward, head = sum(macs(8)), macs(8)[-1]
    # Backwards: once for the weights, and once for the inputs of all layers but the first.
    everything = BATCH * (3 * forward - macs(8)[0])
    assert found["all"].macs == {
        "forward": BATCH * forward,
        "step": everything,
        "episode": STEPS * everything + QUERIES * forward,
    }
    assert found["head"].macs["step"] == BATCH * (forward + head)
    assert found["all"].ratios == {"forward": 1, "step": 1, "episode": 1}


def test_chosen_channels_cost_the_whole_of_their_layers():
    reptile = learner()
    ways = {
        "layers": ["features.conv4", "classifier"],
        "channels": {"features.conv4": [1], "classifier": [0]},
    }
    found = measured({name: Adapting(reptile, only) for name, only in ways.items()})
    forward, (*_, last, head) = sum(macs(8)), macs(8)
    # Weights of both, inputs of the classifier; nothing of their channels is skipped.
    assert found["channels"].macs["step"] == BATCH * (forward + last + 2 * head)
    assert found["channels"].macs == found["layers"].macs


def test_masks_save_bytes_and_channels_save_operations(tmp_path):
    pytest.importorskip("torch_pruning")
    ways = {
        "dense": learner(),
        "masked": learner(0.9),
        "cut": learner(0.5, Structured(torch.zeros(2, 1, 28, 28))),
    }
    found = measured({name: Adapting(reptile) for name, reptile in ways.items()})
    assert found["masked"].macs == found["dense"].macs
    assert found["cut"].macs["forward"] == BATCH * sum(macs(4))
    assert found["masked"].stored < found["dense"].stored
    export(ways["masked"], tmp_path)
    assert found["masked"].stored == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_memory_holds_what_backward_needs():
    reptile = PrunedReptile(Conv4(WAYS, 16), DSDSchedule(0.5, pretrain=9, prune=0, retrain=0))
    found = measured({"all": Adapting(reptile), "head": Adapting(reptile, "classifier")})
    weights = 4 * sum(p.numel() for p in reptile.parameters())
    # At least the weights, their gradients and Adam's two moments, and the first activations.
    activations = 4 * BATCH * 16 * 14 * 14
    assert found["all"].memory > 4 * weights + activations
    assert weights < found["head"].memory < found["all"].memory - 2 * weights


def test_nothing_is_left_changed():
    reptile = learner(0.5)
    before = {name: tensor.clone() for name, tensor in reptile.module.state_dict().items()}
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    given = episode()
    random = torch.get_rng_state()
    adaptation_costs({"a": Adapting(reptile)}, given, steps=1, batch_size=2, rounds=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(reptile.module.state_dict()[n], t) for n, t in before.items())


def test_the_report_shows_what_was_measured(tmp_path):
    reptile = learner()
    found = measured({"dense, all": Adapting(reptile), "dense, head": Adapting(reptile, "*fier")})
    accuracies = {"dense, all": Mean((0.5, 0.7)), "dense, head": Mean((0.4, 0.5))}
    table, picture = write_adaptation(tmp_path / "new", found, accuracies)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with table.open() as file:
        assert [row["way"] for row in csv.DictReader(file)] == ["dense, all", "dense, head"]
    assert read_adaptation(tmp_path / "new") == costs_table(found, accuracies)
    text = "\n".join(adaptation_section(tmp_path / "new"))
    assert "dense, head" in text
    assert "](adaptation.png)" in text
    assert adaptation_section(tmp_path) == []
    table.write_text("way,episode ms\ndense,fast\n")
    with pytest.raises(ValueError, match=r"adaptation\.csv is damaged"):
        read_adaptation(tmp_path / "new")


def test_the_front_is_what_brute_force_finds():
    points = [(float(a), float(b)) for a, b in torch.randint(0, 6, (12, 2)).tolist()]
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert pareto_front(points) == sorted(best)


def test_what_cannot_be_measured():
    reptile = learner()
    with pytest.raises(ValueError, match="ways must name at least one"):
        measured({})
    with pytest.raises(TypeError, match=r"ways\['dense'\] must be an Adapting"):
        measured({"dense": reptile})
    with pytest.raises(TypeError, match="episode must be an Episode"):
        adaptation_costs({"a": Adapting(reptile)}, 3, steps=1, batch_size=1)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        adaptation_costs({"a": Adapting(reptile)}, episode(), steps=0, batch_size=1)
