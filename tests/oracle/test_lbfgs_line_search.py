"""The batched strong-Wolfe search: where it is hard, against ``torch.optim.LBFGS`` and against its own promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_lbfgs_equals_torch import batched, one_by_one, quadratic, rosenbrock, starts
from torch import Tensor

from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.line_search import CURVATURE, DECREASE, Points, Searches
from gia_bench.attacks.optimizers import Moment, Variables


def wavy(x: Tensor, v: int) -> Tensor:
    """Many local minima, more the later the victim."""
    return (0.1 * x**2 + 0.5 * torch.cos((2 + v) * x)).sum() + 0.05 * (x[1:] * x[:-1]).sum()


@pytest.mark.parametrize(
    ("loss", "lr", "iterations"),
    [(rosenbrock, 0.001, 20), (rosenbrock, 30.0, 20), (wavy, 0.001, 10), (wavy, 0.1, 10), (wavy, 30.0, 2)],
)
def test_first_trials_that_are_far_too_short_or_too_long_follow_torch(
    loss: Callable[[Tensor, int], Tensor], lr: float, iterations: int
) -> None:
    """Victims bracket and zoom for different numbers of trials, so that their searches overlap in every way. From far
    away among many minima rounding grows a thousandfold per iteration, so that only the first two can be compared.
    """
    optimizer, start = LBFGS(lr=lr, max_iter=iterations, line_search="strong_wolfe"), 2 * starts(6, 5)
    found, _, _ = batched(loss, start, 1, optimizer)
    expected, _ = one_by_one(loss, start, 1, optimizer)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_history_of_a_hundred_that_is_full_follows_torch() -> None:
    optimizer, start = LBFGS(history=100, line_search="strong_wolfe"), starts(2, 300)
    loss = quadratic(300, 2)
    found, losses, _ = batched(loss, start, 7, optimizer)
    expected, expected_losses = one_by_one(loss, start, 7, optimizer)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_wall_of_infinite_loss_follows_torch() -> None:
    """Some victims run into it at their first trial, others do not."""

    def loss(x: Tensor, v: int) -> Tensor:
        inside = (x < 3).all()
        return torch.where(inside, (x - 2.9).square().sum() * (1 + 10 * v), torch.inf * x.sum().abs())

    optimizer, start = LBFGS(lr=5.0, line_search="strong_wolfe"), starts(4, 3)
    found, losses, _ = batched(loss, start, 2, optimizer)
    expected, expected_losses = one_by_one(loss, start, 2, optimizer)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-8, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, equal_nan=True)


def test_one_step_asks_for_no_more_evaluations_than_its_limit_whatever_the_victims_do() -> None:
    calls = 0

    def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        nonlocal calls
        calls += 1
        x = variables["pixels"].clone().requires_grad_()
        with torch.enable_grad():
            losses = torch.stack([wavy(row[0], v) for v, row in enumerate(x)])
            gradient = torch.autograd.grad(losses.sum(), x)[0]
        return losses.detach()[:, None], {"pixels": gradient}

    optimizer = LBFGS(lr=0.001, max_eval=11, line_search="strong_wolfe")
    variables = {"pixels": 2 * starts(6, 5)[:, None]}
    optimizer.step(variables, optimizer.init(variables), evaluate, Moment(0, 1, 1.0))
    assert 2 <= calls <= 1 + 11


def test_a_finished_search_satisfies_both_conditions_and_its_result_is_its_own_values() -> None:
    """On lines with a known shape, given as functions of the length alone."""

    def points(length: Tensor) -> Points:
        value = torch.cos(3 * length) + (length - 2) ** 2
        slope = -3 * torch.sin(3 * length) + 2 * (length - 2)
        return Points(length, value, slope, slope[:, None])

    origin = points(torch.zeros(5, dtype=torch.float64))
    first = torch.tensor([0.01, 0.3, 1.0, 5.0, 40.0], dtype=torch.float64)
    budget, direction = torch.full((5,), 25), torch.ones(5, 1, dtype=torch.float64)
    searches = Searches.begin(first, budget, origin.loss, origin.gradient, direction)
    ended: dict[int, Points] = {}
    for _ in range(26):
        searches, finished = searches.receive(points(searches.trial), 1e-9)
        for i in finished.nonzero()[:, 0].tolist():
            ended.setdefault(i, Points(*(p[i : i + 1] for p in searches.low)))
    assert len(ended) == 5
    for i, low in ended.items():
        torch.testing.assert_close(low, points(low.length), rtol=1e-12, atol=0)
        assert low.loss <= origin.loss[i] + DECREASE * low.length * origin.slope[i]
        assert low.slope.abs() <= -CURVATURE * origin.slope[i]


def test_a_victim_whose_searches_fail_is_not_at_rest_and_moves_once_the_rate_falls() -> None:
    """One evaluation of a trial a hundred times too long finds nothing; a hundredth of the rate finds something."""
    optimizer = LBFGS(lr=100.0, max_iter=1, max_eval=1, line_search="strong_wolfe")

    def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        x = variables["pixels"]
        return x.square().sum(2), {"pixels": 2 * x}

    variables = {"pixels": torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]], dtype=torch.float64)}
    state = optimizer.init(variables)
    for step, rate in enumerate((1.0, 1.0, 0.001)):
        move = optimizer.step(variables, state, evaluate, Moment(step, 3, rate))
        assert move.settled.flatten().tolist() == [False, True], "only at the bottom nothing will ever change"
        moved = not torch.equal(move.variables["pixels"], variables["pixels"])
        assert moved == (rate < 1)
        variables, state = move.variables, move.state


def test_a_victim_whose_first_search_failed_tries_again_with_its_usual_first_trial() -> None:
    """One evaluation of a trial that is too long finds nothing; the next step begins with lr and finds something."""
    optimizer = LBFGS(lr=0.5, max_iter=1, max_eval=1, line_search="strong_wolfe")

    def loss(x: Tensor, v: int) -> Tensor:
        return 1e3 * x.square().sum() + 1e-3 * x.sum() if v == 0 else x.square().sum()

    start = torch.full((2, 2), 0.01, dtype=torch.float64)
    found, losses, _ = batched(loss, start, 3, optimizer)
    expected, expected_losses = one_by_one(loss, start, 3, optimizer)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
