from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.selection import exact
from gia_bench.defenses.top_k import TopK

CLIENT: Any = None  # pruning looks at the update alone
shapes = st.sampled_from([(), (1,), (2,), (5,), (0,), (19,), (20,), (4, 5), (3, 4, 7)])
shares = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.25, 0.3, 1 / 3])
scopes = st.sampled_from(["tensor", "global"])


@st.composite
def rounds(draw: st.DrawFn) -> list[dict[str, Tensor]]:
    """Updates of one client over three rounds, with ties and zeros."""
    chosen = {f"p{i}": shape for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=4)))}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grain = draw(st.sampled_from([None, 1.0, 100.0]))

    def update(shape: tuple[int, ...]) -> Tensor:
        numbers = torch.randn(shape, generator=generator)
        return numbers if grain is None else (numbers * 2).round() / grain

    return [{name: update(shape) for name, shape in chosen.items()} for _ in range(3)]


@settings(deadline=None, max_examples=80)
@given(updates=rounds(), k1=shares, k2=shares, scope=scopes)
def test_sent_and_residual_are_disjoint_and_sum_to_the_accumulated_update(
    updates: list[dict[str, Tensor]], k1: float, k2: float, scope: str
) -> None:
    defense = DGP(k1=k1, k2=k2, scope=scope)
    state = defense.init_client(updates[0])
    for update in updates:
        full = {name: u + state["residual." + name] for name, u in update.items()}
        sent, state = defense.protect(update, CLIENT, state, {}, {})
        for name in update:
            residual = state["residual." + name]
            assert torch.equal(sent[name] + residual, full[name])
            assert not ((sent[name] != 0) & (residual != 0)).any()


@settings(deadline=None, max_examples=80)
@given(updates=rounds(), k1=shares, k2=shares, scope=scopes)
def test_a_loop_and_vmap_protect_bit_for_bit_the_same(
    updates: list[dict[str, Tensor]], k1: float, k2: float, scope: str
) -> None:
    defense = DGP(k1=k1, k2=k2, scope=scope)
    state = defense.init_client(updates[0])
    states = [{k: v + 1 if v.dtype != torch.bool else v for k, v in state.items()} for _ in updates]
    alone = [defense.protect(u, CLIENT, s, {}, {}) for u, s in zip(updates, states, strict=True)]

    def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}

    mapped = torch.vmap(lambda u, s: defense.protect(u, CLIENT, s, {}, {}))(stack(updates), stack(states))
    for together, singles in zip(mapped, zip(*alone, strict=True), strict=True):
        for name, rows in stack(list(singles)).items():
            assert torch.equal(together[name], rows)


@given(n=st.integers(0, 500), k1=shares, k2=shares)
@settings(deadline=None)
def test_top_k_sends_exactly_as_many_entries_as_dgp_of_the_same_share(n: int, k1: float, k2: float) -> None:
    update = {"w": torch.randn(n, generator=torch.Generator().manual_seed(n))}
    dgp = DGP(k1=k1, k2=k2).select(update)["w"]
    top = TopK(keep=float(1 - exact(k1) - exact(k2))).select(update)["w"]
    assert dgp.sum() == top.sum()
    assert dgp.sum() == math.ceil((1 - exact(k1) - exact(k2)) * n)
    assert bool(dgp.any()) == (n > 0)


@given(updates=rounds(), k1=shares, k2=shares, scope=scopes)
@settings(deadline=None, max_examples=40)
def test_nothing_that_is_dropped_lies_strictly_inside_the_kept_band(
    updates: list[dict[str, Tensor]], k1: float, k2: float, scope: str
) -> None:
    update = updates[0]
    mask = DGP(k1=k1, k2=k2, scope=scope).select(update)
    groups = [[name] for name in update] if scope == "tensor" else [list(update)]
    for names in groups:
        entries = torch.cat([update[n].reshape(-1) for n in names]).abs()
        inside = torch.cat([mask[n].reshape(-1) for n in names])
        if inside.any():
            low, high = entries[inside].min(), entries[inside].max()
            dropped = entries[~inside]
            assert not ((dropped > low) & (dropped < high)).any()


@given(decay=st.sampled_from([0.0, 0.25, 0.5, 0.9]), scale=st.sampled_from([0.25, 1.0]))
@settings(deadline=None)
def test_a_decayed_residual_stays_below_its_geometric_bound(decay: float, scale: float) -> None:
    defense = DGP(error_feedback=ErrorFeedback(scale=scale, decay=decay))
    update = {"w": torch.cat([torch.full((5,), 100.0), torch.linspace(0.5, 1, 95)])}
    state = defense.init_client(update)
    for _ in range(40):
        _, state = defense.protect(update, CLIENT, state, {}, {})
        assert state["residual.w"].max() <= decay * 100 / (1 - decay * scale) * (1 + 1e-6)
