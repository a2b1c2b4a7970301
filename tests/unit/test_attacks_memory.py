"""``max_batch: auto``: tensors are counted right, and a chunk fits into what is free without changing a number."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_problems import Problem, problem
from torch import Tensor

from gia_bench.attacks import group
from gia_bench.attacks.distances import Cosine
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.group import Group
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.memory import SHARE, free_bytes, largest_batch, peak_bytes
from gia_bench.attacks.scene import PixelSpace
from gia_bench.errors import ConfigError


def group_of(p: Problem) -> Group:
    return Group.of(p.observations, p.victim, list(p.labels), PixelSpace.of(p.victim, p.images), Cosine(), {}, None)


def test_the_peak_is_what_was_alive_together_not_what_was_made_in_all() -> None:
    def work() -> Tensor:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # beside it
        del a
        c = b * 2  # in the place of a
        del b
        return c.view(10, 100)  # the same bytes seen in another way

    assert peak_bytes(work) == 8000
    assert peak_bytes(lambda: torch.zeros(10, dtype=torch.float64)) == 80


def test_what_a_backward_pass_keeps_is_counted_under_vmap_and_grows_with_the_candidates() -> None:
    def deep(x: Tensor) -> Tensor:
        return x.sin().exp().sin().exp().sum()

    gradients = torch.func.vmap(torch.func.grad(deep))
    one, four = (peak_bytes(lambda n=n: gradients(torch.zeros(n, 1000))) for n in (1, 4))  # type: ignore[misc]
    assert one >= 4 * 4000, "each of the four functions keeps an input or an output"
    assert 3.5 * one <= four <= 4.5 * one


def test_a_batch_fits_into_its_share_of_what_is_free_and_is_at_least_one() -> None:
    assert largest_batch(100, 10_000) == int(SHARE * 10_000) // 100
    assert largest_batch(100, 10) == 1
    assert largest_batch(100, 0) == 1


@pytest.mark.parametrize("candidates", [1, 3, 6])
def test_the_chunks_of_a_fitted_group_stay_within_the_budget(candidates: int) -> None:
    """The oracle is the count of the whole evaluation; all six at once need more than a small budget."""
    p = problem(3, dtype=torch.float64)
    variables = {"pixels": torch.zeros(3, 2, *p.images.shape[1:], dtype=torch.float64)}
    whole = group_of(p)
    one = peak_bytes(lambda: whole._part(variables, slice(0, 1), slice(0, 1)))
    budget = int(candidates * one / SHARE) + 1
    fitted = whole.fitted(variables, budget)
    assert fitted.max_batch == candidates
    kept = 3 * variables["pixels"].nbytes  # losses, gradients and their copies of all candidates
    assert peak_bytes(lambda: fitted.evaluate(variables)) <= SHARE * budget + kept
    torch.testing.assert_close(fitted.evaluate(variables), whole.evaluate(variables), rtol=1e-10, atol=1e-13)


def test_the_cpu_says_what_it_has_left_and_other_devices_are_refused_with_the_way_out() -> None:
    assert free_bytes(torch.device("cpu")) > 0
    with pytest.raises(ConfigError, match=r"attack.max_batch='auto'.*give a number, or null"):
        free_bytes(torch.device("meta"))


def test_auto_gives_the_numbers_of_any_chunk_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(3, dtype=torch.float64)
    attack = inverting_gradients(steps=4, restarts=2)
    expected = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
    sizes = []

    def chosen(one: int, free: int) -> int:
        sizes.append(largest_batch(one, int(2 * one / SHARE)))
        return sizes[-1]

    monkeypatch.setattr(group, "largest_batch", chosen)
    auto = dataclasses.replace(attack, max_batch="auto")
    found = auto.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
    assert sizes == [2]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.inputs, b.inputs, rtol=1e-5, atol=1e-7)
        assert a.score == pytest.approx(b.score, rel=1e-6)


def test_what_is_no_batch_and_no_line_search_is_refused_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"attack.max_batch='all': give at least 1, or null, or auto"):
        dlg(max_batch="all")
    with pytest.raises(ConfigError, match=r"attack.max_batch=0"):
        dlg(max_batch=0)
    with pytest.raises(ConfigError, match="Choose one of: none, strong_wolfe"):
        LBFGS(line_search="armijo")
    with pytest.raises(ConfigError, match=r"lbfgs.max_eval=0: give at least 1"):
        LBFGS(max_eval=0)
