"""Numbers at points: each on a place of its own, and near its point."""

from __future__ import annotations

import math
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from gia_bench.report.callouts import HEIGHT, WIDTH, callouts

places = st.tuples(st.floats(0, 300), st.floats(0, 200))


@given(points=st.lists(places, max_size=12))
def test_no_number_covers_another_and_none_is_far(points: list[tuple[float, float]]) -> None:
    spots = callouts(points)
    assert len(spots) == len(points)
    for a, b in combinations(spots, 2):
        assert abs(a[0] - b[0]) >= WIDTH or abs(a[1] - b[1]) >= HEIGHT
    assert all(math.dist(spot, point) <= 80 for spot, point in zip(spots, points, strict=True))


def test_numbers_of_equal_points_stand_apart() -> None:
    assert len(set(callouts([(5.0, 5.0)] * 20))) == 20
