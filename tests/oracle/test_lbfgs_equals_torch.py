"""The batched L-BFGS against ``torch.optim.LBFGS``, one candidate at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gia_bench.attacks.lbfgs import LBFGS, LINE_SEARCHES
from gia_bench.attacks.optimizers import Moment, Variables

Loss = Callable[[Tensor, int], Tensor]
"""(variables [n] of one candidate, its number) -> scalar."""


def batched(loss: Loss, start: Tensor, steps: int, optimizer: LBFGS) -> tuple[Tensor, Tensor, int]:
    """Final variables [V, n], the losses [steps, V] that the outer steps start from, and how many settled."""

    def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        x = variables["pixels"].clone().requires_grad_()
        with torch.enable_grad():
            losses = torch.stack([loss(row[0], v) for v, row in enumerate(x)])
            gradient = torch.autograd.grad(losses.sum(), x)[0]
        return losses.detach()[:, None], {"pixels": gradient}

    variables, seen, settled = {"pixels": start[:, None]}, [], 0
    state = optimizer.init(variables)
    for step in range(steps):
        move = optimizer.step(variables, state, evaluate, Moment(step, steps, 1.0))
        variables, state = move.variables, move.state
        seen.append(move.loss[:, 0])
        settled = int(move.settled.sum())
    return variables["pixels"][:, 0], torch.stack(seen), settled


def one_by_one(loss: Loss, start: Tensor, steps: int, optimizer: LBFGS) -> tuple[Tensor, Tensor]:
    ends, losses = [], []
    for v, row in enumerate(start):
        x = row.clone().requires_grad_()
        oracle = torch.optim.LBFGS(
            [x],
            lr=optimizer.lr,
            max_iter=optimizer.max_iter,
            max_eval=optimizer.max_eval,
            history_size=optimizer.history,
            tolerance_grad=optimizer.tolerance_grad,
            tolerance_change=optimizer.tolerance_change,
            line_search_fn=None if optimizer.line_search == "none" else optimizer.line_search,
        )

        def closure(x: Tensor = x, v: int = v) -> Tensor:
            value = loss(x, v)
            (x.grad,) = torch.autograd.grad(value, x)
            return value

        values = [oracle.step(closure).detach() for _ in range(steps)]  # type: ignore[no-untyped-call]
        losses.append(torch.stack(values))
        ends.append(x.detach())
    return torch.stack(ends), torch.stack(losses, 1)


def quadratic(n: int, victims: int) -> Loss:
    draw = torch.Generator().manual_seed(0)
    roots = torch.randn(victims, n, n, generator=draw, dtype=torch.float64) / n**0.5
    matrices = roots @ roots.mT + 0.05 * torch.eye(n, dtype=torch.float64)
    centres = torch.randn(victims, n, generator=draw, dtype=torch.float64)
    return lambda x, v: (x - centres[v]) @ matrices[v] @ (x - centres[v]) / 2


def rosenbrock(x: Tensor, v: int) -> Tensor:
    return (0.02 * (v + 1) * (x[1:] - x[:-1] ** 2) ** 2 + 0.01 * (1 - x[:-1]) ** 2).sum()


def starts(victims: int, n: int) -> Tensor:
    return torch.randn(victims, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize("history", [100, 5, 1])
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_quadratics_follow_torch(history: int, lr: float, line_search: str) -> None:
    """Two outer steps: with a short history rounding grows a thousandfold per step, in torch's own runs too."""
    optimizer, start = LBFGS(history=history, lr=lr, line_search=line_search), starts(4, 12)
    loss = quadratic(12, 4)
    found, losses, _ = batched(loss, start, 2, optimizer)
    expected, expected_losses = one_by_one(loss, start, 2, optimizer)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
@pytest.mark.parametrize(("max_iter", "max_eval"), [(20, 25), (7, 8), (7, 4), (3, 3), (2, 2), (1, 1)])
def test_curved_valleys_follow_torch_with_rejected_pairs_and_a_full_ring(
    max_iter: int, max_eval: int, line_search: str
) -> None:
    optimizer = LBFGS(history=4, max_iter=max_iter, max_eval=max_eval, lr=0.5, line_search=line_search)
    start = starts(3, 6)
    found, losses, _ = batched(rosenbrock, start, 5, optimizer)
    expected, expected_losses = one_by_one(rosenbrock, start, 5, optimizer)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("line_search", "rest"), [("none", 3), ("strong_wolfe", 3)])
def test_victims_that_stop_at_different_times_do_not_touch_each_other(line_search: str, rest: int) -> None:
    """One starts at its optimum, one is flat and never moves, one gains less than the tolerance, one goes on."""

    def loss(x: Tensor, v: int) -> Tensor:
        return [(x**2).sum(), 0 * x.sum(), 1e-10 * (x - 3).square().sum(), (x - 1).pow(4).sum()][v]

    start = starts(4, 5)
    start[0] = 0
    optimizer = LBFGS(lr=0.2, line_search=line_search)
    found, losses, settled = batched(loss, start, 6, optimizer)
    expected, expected_losses = one_by_one(loss, start, 6, optimizer)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-7, atol=1e-12)
    assert torch.equal(found[1], start[1])
    assert not torch.equal(found[3], start[3])
    assert settled == rest


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_a_victim_with_nan_leaves_the_others_as_they_are_alone(line_search: str) -> None:
    def loss(x: Tensor, v: int) -> Tensor:
        return x.square().sum() * (float("nan") if v == 1 else 1.0 + v) + (x**4).sum()

    optimizer, start = LBFGS(lr=0.5, line_search=line_search), starts(3, 4)
    found, _, _ = batched(loss, start, 3, optimizer)
    expected, _ = one_by_one(loss, start, 3, optimizer)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_deep_leakage_follows_torch_victim_by_victim(line_search: str) -> None:
    """A small sigmoid network, images and soft labels searched together, three victims, three outer steps."""
    draw = torch.Generator().manual_seed(0)
    w1, b1, w2, b2 = (
        (torch.rand(*shape, generator=draw, dtype=torch.float64) - 0.5).requires_grad_()
        for shape in [(8, 16), (8,), (3, 8), (3,)]
    )
    weights = [w1, b1, w2, b2]

    def gradient(image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        scores = w2 @ (w1 @ image + b1).sigmoid() + b2
        return torch.autograd.grad(-(label.softmax(-1) * scores.log_softmax(-1)).sum(), weights, create_graph=True)

    images = torch.rand(3, 16, generator=draw, dtype=torch.float64)
    labels = 20 * torch.eye(3, dtype=torch.float64)
    targets = [[g.detach() for g in gradient(x, y)] for x, y in zip(images, labels, strict=True)]

    def loss(x: Tensor, v: int) -> Tensor:
        pairs = zip(gradient(x[:16], x[16:]), targets[v], strict=True)
        return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()

    optimizer, start = LBFGS(line_search=line_search), starts(3, 19)
    found, losses, _ = batched(loss, start, 3, optimizer)
    expected, expected_losses = one_by_one(loss, start, 3, optimizer)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
