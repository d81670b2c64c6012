"""N:M and block masks against brute force, and against torch's own semi-structured format."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_prune import DSDSchedule, PrunedReptile, Pruner
from l2l_prune.masking.patterns import Block, NByM

SCHEDULE = DSDSchedule(0.5, pretrain=1, prune=2, retrain=1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))


def n_by_m_by_hand(scores, n, m):
    """Every group of m input neighbours, one at a time."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    rest = [range(size) for axis, size in enumerate(scores.shape) if axis != 1]
    for other in itertools.product(*rest):
        for start in range(0, scores.shape[1], m):
            places = [(other[0], start + i, *other[1:]) for i in range(m)]
            for place in sorted(places, key=lambda p: (-float(scores[p]), p[1]))[:n]:
                mask[place] = True
    return mask


@pytest.mark.parametrize("shape", [(5, 8), (3, 12, 2, 3), (2, 4, 3)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_n_by_m_is_the_brute_force_choice(shape, n, m, ties):
    scores = torch.randint(0, 3, shape).float() if ties else torch.rand(shape)
    keep = scores.numel() * n // m
    pattern = NByM(n, m)
    assert pattern.count(scores.shape, keep) == keep
    mask = pattern.mask(scores, keep)
    assert torch.equal(mask, n_by_m_by_hand(scores, n, m))
    if len(shape) == 4:
        channels_last = scores.to(memory_format=torch.channels_last)
        assert torch.equal(pattern.mask(channels_last, keep), mask)


@pytest.mark.parametrize(("shape", "rows", "columns"), [((6, 8), 3, 2), ((4, 2, 3, 3), 2, 9)])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_blocks_are_whole_and_the_best_by_sum(shape, rows, columns, sparsity):
    scores = torch.rand(shape)
    asked = scores.numel() - round(sparsity * scores.numel())
    pattern = Block(rows, columns)
    keep = pattern.count(scores.shape, asked)
    matrix = scores.reshape(shape[0], -1)
    places = [(r, c) for r in range(0, shape[0], rows) for c in range(0, matrix.shape[1], columns)]
    sums = {(r, c): float(matrix[r : r + rows, c : c + columns].sum()) for r, c in places}
    kept = len(places) - round(sparsity * len(places))
    assert keep == kept * rows * columns
    expected = torch.zeros(matrix.shape, dtype=torch.bool)
    for r, c in sorted(places, key=lambda place: -sums[place])[:kept]:
        expected[r : r + rows, c : c + columns] = True
    assert torch.equal(pattern.mask(scores, keep), expected.view(shape))


def test_a_pruned_linear_weight_survives_torchs_two_by_four_format():
    """torch compresses to 2:4 and back: only what is 2:4 comes back whole."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")

    def round_trip(weight):
        half = weight.half()
        values, meta = conversions.sparse_semi_structured_from_dense_cutlass(half)
        return torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, meta), half)

    net = nn.Sequential(nn.Linear(64, 64))
    pruner = Pruner(net, SCHEDULE, pattern=NByM(2, 4))
    assert not round_trip(net[0].weight.detach())
    pruner.step()
    assert round_trip(net[0].weight.detach())
    if torch.cuda.is_available():
        torch.sparse.to_sparse_semi_structured(net[0].weight.detach().half().cuda())


@pytest.mark.parametrize("pattern", [NByM(2, 4), Block(2, 2)], ids=str)
def test_masks_hold_through_training_and_resume(pattern):
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    pruner = Pruner(net, SCHEDULE, optimizer, skip="conv1", pattern=pattern)
    for _ in range(3):
        for name, mask in pruner.masks.items():
            weight = net.get_submodule(name.rpartition(".")[0]).weight
            assert (weight[~mask] == 0).all()
            if pruner.sparse:
                again = pattern.mask(mask.float(), int(mask.sum()))
                assert torch.equal(again, mask)
                assert int(mask.sum()) == mask.numel() // 2
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(6, 3, 6, 6)), torch.arange(6) % 4).backward()
        optimizer.step()
        state = pruner.state_dict()
        pruner.step()
    other = Net()
    unlike = Pruner(other, SCHEDULE, skip="conv1", pattern=pattern)
    unlike.load_state_dict(state)
    assert all(torch.equal(unlike.masks[name], mask) for name, mask in state["masks"].items())


def test_reptile_takes_a_pattern():
    net = Net()
    reptile = PrunedReptile(net, SCHEDULE, skip="conv1", pattern=NByM(1, 2))
    learner = reptile.clone()
    learner.adapt(learner(torch.randn(6, 3, 6, 6)).square().mean())
    reptile.collect(learner)
    reptile.step()
    groups = net.fc.weight.reshape(-1, 2)
    assert ((groups != 0).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NByM(4, 4), "n must be below m = 4"),
        (lambda: NByM(0, 4), "n must be >= 1"),
        (lambda: NByM(1, 1), "m must be >= 2"),
        (lambda: Block(0, 2), "rows must be >= 1"),
        (lambda: Pruner(Net(), SCHEDULE, pattern=NByM(2, 4)), r"conv1.weight .*3 inputs.*skip="),
        (
            lambda: Pruner(Net(), SCHEDULE, skip="conv1", pattern=NByM(1, 4)),
            r"conv2.weight .*the sparsity must be 0.75",
        ),
        (
            lambda: Pruner(Net(), SCHEDULE, only="fc.bias", pattern=NByM(1, 2)),
            r"fc.bias .*it has no inputs",
        ),
        (
            lambda: Pruner(Net(), SCHEDULE, pattern=Block(3, 1)),
            r"conv1.weight .*8 x 27 does not divide",
        ),
    ],
)
def test_bad_patterns_name_the_tensor(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_checkpoint_of_another_pattern_is_refused():
    state = Pruner(Net(), SCHEDULE, skip="conv1", pattern=NByM(2, 4)).state_dict()
    pruner = Pruner(Net(), SCHEDULE, skip="conv1")
    with pytest.raises(ValueError, match=r"is NByM\(n=2, m=4\), this Pruner's Unstructured"):
        pruner.load_state_dict(state)


def test_nan_scores_are_named():
    with pytest.raises(ValueError, match="NaN or infinity"):
        NByM(2, 4).mask(torch.full((2, 4), float("nan")), 4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pattern", [NByM(2, 4), Block(3, 4)], ids=str)
def test_transposed_convolutions_are_pruned_along_their_inputs(pattern, groups):
    """Their weight is [inputs, outputs / groups, kernel]; each place is looked up by hand."""
    layer = nn.ConvTranspose2d(8 * groups, 6 * groups, (2, 2), groups=groups)
    weight = layer.weight.detach().abs().clone()
    pruner = Pruner(layer, DSDSchedule(0.5, pretrain=0, prune=1, retrain=1), pattern=pattern)
    mask = pruner.masks["weight"]
    kernel = list(itertools.product(range(2), range(2)))

    def place(output, column):
        """Where the matrix [outputs, inputs / groups x kernel] has an entry."""
        group, input_ = output // 6, column // 4
        return (group * 8 + input_, output % 6, *kernel[column % 4])

    def at(tensor, places):
        return torch.stack([tensor[one] for one in places])

    if isinstance(pattern, NByM):
        for output, start, k in itertools.product(range(6 * groups), (0, 4), range(4)):
            four = [place(output, 4 * (start + i) + k) for i in range(4)]
            kept = at(weight, four).argsort(descending=True)[:2]
            assert at(mask, four).nonzero().flatten().tolist() == sorted(kept.tolist())
    else:
        blocks = {
            (row, column): [place(row + r, column + c) for r in range(3) for c in range(4)]
            for row, column in itertools.product(range(0, 6 * groups, 3), range(0, 32, 4))
        }
        best = sorted(blocks, key=lambda at_: -float(at(weight, blocks[at_]).sum()))
        for number, at_ in enumerate(best):
            assert at(mask, blocks[at_]).tolist() == [number < len(best) // 2] * 12


def test_a_transposed_convolution_is_measured_by_its_inputs():
    with pytest.raises(ValueError, match=r"weight of shape \(6, 8, 3\) .*it has 6 inputs"):
        Pruner(nn.ConvTranspose1d(6, 8, 3), SCHEDULE, pattern=NByM(2, 4))
    pruner = Pruner(nn.ConvTranspose1d(8, 6, 3), SCHEDULE, pattern=NByM(2, 4))
    pruner.step()
    assert pruner.sparsity == 0.5
