from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.top_k import TopK

OFF = ErrorFeedback(enabled=False)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def by_sorting(entries: Tensor, largest_percent: int, smallest_percent: int) -> set[int]:
    """The kept positions by a plain sort: largest first, then the lower position; counts in whole numbers."""
    n = entries.numel()
    magnitudes = entries.abs().double().tolist()
    order = sorted(range(n), key=lambda i: (-magnitudes[i], i))
    first = largest_percent * n // 100
    return set(order[first : first + n - (largest_percent + smallest_percent) * n // 100])


def kept(mask: Tensor) -> set[int]:
    return set(mask.reshape(-1).nonzero().view(-1).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("percents", [(5, 75), (0, 80), (1, 60), (10, 0), (0, 0), (50, 49), (29, 57)])
def test_the_kept_band_is_that_of_a_plain_sort(dtype: torch.dtype, percents: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    k1, k2 = percents
    defense = DGP(k1=k1 / 100, k2=k2 / 100, error_feedback=OFF)
    for n in [*range(45), 100, 1000, 1234]:
        distinct = torch.randn(n, generator=generator).to(dtype)
        tied = torch.randint(-3, 4, (n,), generator=generator).to(dtype)
        for entries in (distinct, tied):
            assert kept(defense.select({"w": entries})["w"]) == by_sorting(entries, k1, k2), n


@pytest.mark.parametrize("percents", [(5, 75), (0, 80), (3, 20)])
def test_global_scope_ranks_all_tensors_together(percents: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    k1, k2 = percents
    update = {
        name: torch.randint(-9, 10, shape, generator=generator).float()
        for name, shape in {"z": (4, 5), "a": (7,), "m": (), "e": (0, 2)}.items()
    }
    mask = DGP(k1=k1 / 100, k2=k2 / 100, scope="global", error_feedback=OFF).select(update)
    row = torch.cat([u.reshape(-1) for u in update.values()])
    assert kept(torch.cat([mask[name].reshape(-1) for name in update])) == by_sorting(row, k1, k2)
    assert {name: m.shape for name, m in mask.items()} == {name: u.shape for name, u in update.items()}


def test_top_k_keeps_what_a_plain_sort_puts_first() -> None:
    generator = torch.Generator().manual_seed(2)
    for n in [*range(45), 999]:
        entries = torch.randn(n, generator=generator)
        assert kept(TopK(keep=0.2, error_feedback=OFF).select({"w": entries})["w"]) == by_sorting(entries, 0, 80)


def by_the_authors_compressor(entries: np.ndarray) -> set[int]:
    """As described: zero the n // 20 largest, then keep the (2 n // 5) // 2 largest of what is left."""
    n = len(entries)
    left = np.abs(entries)
    left[np.argsort(-left)[: n // 20]] = 0
    return set(np.argsort(-left)[: (2 * n // 5) // 2].tolist())


def by_the_authors_percentiles(entries: np.ndarray) -> set[int]:
    magnitudes = np.abs(entries)
    low, high = np.percentile(magnitudes, [75, 95])
    return set(np.flatnonzero((magnitudes >= low) & (magnitudes <= high)).tolist())


@pytest.mark.parametrize("n", [20, 97, 100, 431, 1000, 4321])
def test_both_of_the_authors_versions_agree_but_for_rounding(n: int) -> None:
    entries = np.random.default_rng(n).normal(size=n).astype(np.float32)
    ours = kept(DGP(k1=0.05, k2=0.75, error_feedback=OFF).select({"w": torch.from_numpy(entries)})["w"])
    compressor = by_the_authors_compressor(entries)
    assert compressor <= ours
    assert len(ours) - len(compressor) == (0 if n % 5 == 0 else 1)
    assert len(ours ^ by_the_authors_percentiles(entries)) <= 2


def test_a_feedback_step_equals_the_plain_recursion() -> None:
    generator = torch.Generator().manual_seed(3)
    defense = DGP(k1=0.1, k2=0.5, error_feedback=ErrorFeedback(scale=0.5, decay=0.75))
    state = defense.error_feedback.initial({"w": torch.zeros(60)})
    residual = np.zeros(60, dtype=np.float32)
    for _ in range(6):
        update = torch.randn(60, generator=generator)
        sent, state = defense.error_feedback.send({"w": update}, state, defense.select)
        full = update.numpy() + np.float32(0.5) * residual
        expected = np.zeros(60, dtype=np.float32)
        where = list(by_sorting(torch.from_numpy(full), 10, 50))
        expected[where] = full[where]
        residual = np.float32(0.75) * (full - expected)
        np.testing.assert_array_equal(sent["w"].numpy(), expected)
        np.testing.assert_array_equal(state["residual.w"].numpy(), residual)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_large_update_with_many_ties_keeps_the_exact_count(scope: str) -> None:
    entries = torch.randint(-40, 41, (300_000,), generator=torch.Generator().manual_seed(4)).float()
    mask = DGP(scope=scope, error_feedback=OFF).select({"w": entries})["w"]
    order = np.argsort(-np.abs(entries.numpy()), kind="stable")
    assert np.array_equal(np.sort(order[15_000:75_000]), np.flatnonzero(mask.numpy()))
