"""Tensors by name as rows, and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gia_bench.rows import SMALL, cut, joined, pieces
from gia_bench.seeding import stream

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5)


def tensors(shapes: list[list[int]]) -> dict[str, Tensor]:
    return {str(i): torch.randn(shape, generator=stream(0, i)) for i, shape in enumerate(shapes)}


@given(SHAPES)
def test_a_row_that_is_cut_is_what_was_joined(shapes: list[list[int]]) -> None:
    whole = tensors(shapes)
    again = cut(joined(whole), whole)
    assert list(again) == list(whole)
    assert all(torch.equal(again[name], t) for name, t in whole.items())


def test_rows_are_joined_and_cut_under_vmap() -> None:
    each = {"a": torch.randn(3, 2, 4), "b": torch.randn(3), "c": torch.randn(3, 5)}
    rows = torch.vmap(joined)(each)
    assert torch.equal(rows, torch.cat([t.reshape(3, -1) for t in each.values()], 1))
    again = torch.vmap(lambda row, like: cut(row, like))(rows, each)
    assert all(torch.equal(again[name], t) for name, t in each.items())


def test_large_tensors_are_pieces_of_their_own_and_small_ones_one_row() -> None:
    a = tensors([[2, 3], [SMALL + 1], [4], [2, SMALL]])
    b = {name: t + 1 for name, t in a.items()}
    large, larger, small = pieces(a, b)
    assert torch.equal(large[0], a["1"])
    assert torch.equal(larger[1], b["3"])
    assert torch.equal(small[0], torch.cat([a["0"].flatten(), a["2"]]))
    assert all(torch.equal(own + 1, other) for own, other in (large, larger, small))


def test_the_observed_tensors_are_the_ones_that_count() -> None:
    observed = tensors([[2, 3], [SMALL + 1]])
    dummy = {"more": torch.ones(5), **{name: t + 1 for name, t in reversed(observed.items())}}
    large, small = pieces(dummy, observed)
    assert torch.equal(large[0], dummy["1"])
    assert torch.equal(small[0], dummy["0"].flatten())
    assert torch.equal(small[1], observed["0"].flatten())
