"""Where the numbers of crowded points go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Place: TypeAlias = tuple[float, float]

WIDTH, HEIGHT = 11.0, 8.0
"""Of a number, in points."""


def callouts(points: Sequence[Place]) -> list[Place]:
    """For each point (in points of the page), where its number's middle goes: near it, on no other number or point.

    Rings of eight directions are tried, the nearest first; a number for which all are taken stays above its point.
    """
    placed: list[Place] = []
    for x, y in points:
        around = [(x + r * math.cos(a), y + r * math.sin(a)) for r in RINGS for a in DIRECTIONS]
        free = (
            spot
            for spot in around
            if all(not _near(spot, other) for other in placed) and all(not _near(spot, p, 0.8) for p in points)
        )
        placed.append(next(free, around[0]))
    return placed


RINGS = [9.0 * k for k in range(1, 9)]
DIRECTIONS = [math.pi / 4 * k for k in (1, 7, 2, 6, 0, 3, 5, 4)]


def _near(a: Place, b: Place, share: float = 1.0) -> bool:
    return abs(a[0] - b[0]) < share * WIDTH and abs(a[1] - b[1]) < share * HEIGHT
