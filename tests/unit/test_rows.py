"""Tensors by name as rows, and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gia_bench.rows import cut, joined
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


def test_named_tensors_are_joined_in_the_order_of_the_names() -> None:
    whole = tensors([[2, 3], [5], [4]])
    assert torch.equal(joined(whole, ["2", "0"]), torch.cat([whole["2"], whole["0"].flatten()]))
