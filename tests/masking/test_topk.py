from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from l2l_prune.masking import topk as masks
from l2l_prune.masking.criteria import magnitude
from l2l_prune.masking.topk import kept_count, top_mask


def brute_force(weight: np.ndarray, keep: int) -> np.ndarray:
    """Sort indices by falling magnitude, then by rising flat index."""
    flat = weight.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-abs(float(flat[i])), i))
    mask = np.zeros(flat.size, dtype=bool)
    mask[order[:keep]] = True
    return mask.reshape(weight.shape)


# Few distinct values make ties common; the rest covers zeros, subnormals and huge numbers.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0]),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
)


@given(
    npst.arrays(np.float32, npst.array_shapes(min_dims=1, max_dims=4, max_side=6), elements=values),
    st.data(),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_keeps_the_largest_and_of_ties_the_first(array, data, dtype):
    keep = data.draw(st.integers(0, array.size))
    weight = torch.from_numpy(array).to(dtype)
    if not torch.isfinite(weight).all():
        return
    mask = top_mask(magnitude(weight), keep)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == keep
    assert np.array_equal(mask.numpy(), brute_force(weight.double().numpy(), keep))


def test_memory_layout_does_not_matter():
    weight = torch.randint(-3, 4, (6, 5, 3, 3)).float()
    expected = top_mask(magnitude(weight), 100)
    assert torch.equal(
        top_mask(magnitude(weight.to(memory_format=torch.channels_last)), 100), expected
    )
    transposed = weight.permute(1, 0, 3, 2)
    assert np.array_equal(
        top_mask(magnitude(transposed), 100).numpy(), brute_force(transposed.numpy(), 100)
    )


def test_all_equal_weights_keep_the_first():
    assert top_mask(torch.ones(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]


@given(st.integers(1, 10_000), st.floats(0, 0.999))
def test_kept_count_is_the_paper_count(numel, sparsity):
    assert kept_count(numel, sparsity) == numel - round(sparsity * numel)
    assert 0 <= kept_count(numel, sparsity) <= numel


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_nan_and_infinity_are_refused(bad, keep):
    with pytest.raises(ValueError, match="NaN or infinity"):
        top_mask(torch.tensor([1.0, bad, 2.0]), keep)


def test_refuses_complex_and_impossible_counts():
    with pytest.raises(TypeError, match="complex"):
        top_mask(torch.ones(3, dtype=torch.complex64), 1)
    for keep in (-1, 4):
        with pytest.raises(ValueError, match="keep"):
            top_mask(torch.ones(3), keep)


def test_weight_is_left_alone_and_needs_no_grad():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    before = weight.detach().clone()
    mask = top_mask(magnitude(weight), 5)
    assert torch.equal(weight.detach(), before)
    assert not mask.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.randn(n),
        lambda n: torch.randn(n).abs(),
        lambda n: torch.randint(-3, 4, (n,)) / 3,  # ties, and zeros of both signs
        lambda n: -torch.rand(n) * 1e-40,  # subnormal in float32, zero in half
        lambda n: torch.ones(n),
        lambda n: torch.cat([torch.zeros(n - 2), torch.tensor([6e4, -6e4])]),
    ],
    ids=["normal", "magnitudes", "ties", "subnormal", "equal", "far apart"],
)
def test_halving_finds_what_sorting_finds(monkeypatch, make, dtype):
    """The path of large tensors, on small ones."""
    monkeypatch.setattr(masks, "_LARGE", 16)
    scores = make(101).to(dtype)
    for keep in (1, 2, 50, 99, 100):
        order = sorted(range(101), key=lambda i: (-float(scores[i]), i))
        expected = torch.zeros(101, dtype=torch.bool)
        expected[order[:keep]] = True
        assert torch.equal(top_mask(scores, keep), expected), keep


def test_large_integer_scores(monkeypatch):
    monkeypatch.setattr(masks, "_LARGE", 4)
    scores = torch.tensor([5, 1, 4, 2, 4, 9])  # a criterion may count
    assert top_mask(scores, 3).tolist() == [True, False, True, False, False, True]


PEAK = """
import resource, sys, torch
from l2l_prune.masking.topk import top_mask
torch.set_num_threads(1)
kind, dtype = sys.argv[1], getattr(torch, sys.argv[2])
make = torch.rand if kind == "random" else torch.ones
scores = make(30_000_000, dtype=dtype)
top_mask(torch.rand(5_000_000), 100)  # what torch itself loads
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mask = top_mask(scores.abs(), 15_000_000)
assert int(mask.count_nonzero()) == 15_000_000
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
print(1024 * peak / scores.nbytes)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize(("kind", "dtype"), [("random", "float32"), ("equal", "float32")])
def test_memory_for_a_large_layer_stays_below_three_times_its_size(kind, dtype):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, kind, dtype], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 3
