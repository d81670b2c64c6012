"""Without a GPU: the checks of ``test_cuda.py`` pass on the CPU, and fail on planted faults."""

from __future__ import annotations

import pytest
from torch.multiprocessing import ProcessRaisedException

from tests.cuda.conftest import full_precision
from tests.cuda.faults import CHECKS, PLANTED, as_case, each_check
from tests.cuda.place import Place


@each_check
def test_passes_on_the_cpu(check, tmp_path):
    with full_precision():
        check(Place("cpu", tmp_path))


@pytest.mark.parametrize(
    ("check", "fault"),
    [as_case(check, fault, name=f"{check.__name__}-{fault.told}") for check, fault in PLANTED],
)
def test_fails_with(check, fault, tmp_path):
    """A check notices the fault, or the library itself does (a ValueError at construction)."""
    with pytest.raises((AssertionError, RuntimeError, ValueError, ProcessRaisedException)):
        check(Place("cpu", tmp_path, fault.planted))


def test_every_check_has_a_fault():
    assert {check.__name__ for check, _ in PLANTED} == {check.__name__ for check in CHECKS}
