"""Which of several networks nothing else beats in both cost and accuracy."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points ``(cost, accuracy)`` than which none is both cheaper and better, by cost.

    Examples:
        >>> pareto_front([(3, 0.9), (1, 0.5), (2, 0.4)])
        [(1, 0.5), (3, 0.9)]
    """
    return [points[place] for place in front_places(points)]


def front_places(points: Sequence[tuple[float, float]]) -> list[int]:
    """Where the points of :func:`pareto_front` stand in ``points``, by cost."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front
