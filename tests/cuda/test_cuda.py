"""Every feature on a GPU against the CPU in float64: ``make test-cuda``."""

from __future__ import annotations

from tests.cuda.faults import each_check


@each_check
def test_on_device(place, check):
    check(place)
