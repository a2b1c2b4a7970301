"""One example at a time: against one ``torch.optim.LBFGS`` per example, on the same turns."""

from __future__ import annotations

import pytest
import torch
from attack_problems import problem
from torch import Tensor

from gia_bench.attacks.distances import Euclidean
from gia_bench.attacks.group import Group
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.one_at_a_time import OneAtATime
from gia_bench.attacks.optimizers import Moment, Variables
from gia_bench.attacks.scene import PixelSpace


@pytest.mark.parametrize("max_iter", [1, 5])
def test_one_example_at_a_time_follows_one_torch_lbfgs_per_example(max_iter: int) -> None:
    """DLG's loss on batches of two, images and labels together, two victims; example 0 moves four times of seven."""
    p = problem(2, batch=2, shape=(1, 4, 4), dtype=torch.float64)
    loss_of = Group.of(p.observations, p.victim, [None, None], PixelSpace.of(p.victim, p.images), Euclidean(), {}, None)
    draw, inner = torch.Generator().manual_seed(0), LBFGS(max_iter=max_iter, lr=0.5)
    start: Variables = {
        "pixels": torch.randn(2, 1, 2, 1, 4, 4, generator=draw, dtype=torch.float64),
        "labels": torch.randn(2, 1, 2, 4, generator=draw, dtype=torch.float64),
    }
    optimizer, variables, losses = OneAtATime(optimizer=inner), start, []
    state = optimizer.init(variables)
    for step in range(7):
        before, move = variables, optimizer.step(variables, state, loss_of.evaluate, Moment(step, 7, 1.0))
        variables, state = move.variables, move.state
        losses.append(move.loss[:, 0])
        still = 1 - step % 2
        assert all(torch.equal(variables[k][:, :, still], before[k][:, :, still]) for k in variables)

    for v in range(2):
        own = {k: [t[v, 0, b].clone() for b in range(2)] for k, t in start.items()}
        turns = [
            torch.optim.LBFGS([own["pixels"][b], own["labels"][b]], lr=0.5, max_iter=max_iter, history_size=100)
            for b in range(2)
        ]

        def closure(b: int, v: int = v, own: dict[str, list[Tensor]] = own) -> Tensor:
            whole = {k: start[k].clone() for k in start}
            for k in whole:
                whole[k][v, 0] = torch.stack(own[k])
            loss, gradient = loss_of.evaluate(whole)
            for k in whole:
                own[k][b].grad = gradient[k][v, 0, b]
            return loss[v, 0]

        for step in range(7):
            expected = turns[step % 2].step(lambda b=step % 2: closure(b))  # type: ignore[misc, no-untyped-call]
            torch.testing.assert_close(losses[step][v], expected, rtol=1e-6, atol=1e-12)
        for k, rows in own.items():
            torch.testing.assert_close(variables[k][v, 0], torch.stack(rows), rtol=1e-5, atol=1e-8)


def test_examples_at_rest_end_a_search_only_when_all_of_them_rest() -> None:
    """Two numbers; the second is at its optimum, the first moves on for some turns."""

    def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        x = variables["pixels"]
        weight = torch.tensor([1.0, 0.0], dtype=x.dtype)
        return (weight * (x - 3) ** 2).sum(2) / 2, {"pixels": weight * (x - 3)}

    optimizer, variables = (
        OneAtATime(optimizer=LBFGS(max_iter=2)),
        {"pixels": torch.zeros(1, 1, 2, dtype=torch.float64)},
    )
    state, settled = optimizer.init(variables), []
    for step in range(8):
        move = optimizer.step(variables, state, evaluate, Moment(step, 8, 1.0))
        variables, state = move.variables, move.state
        settled.append(bool(move.settled))
    assert not settled[1]
    assert settled[-1]
    torch.testing.assert_close(variables["pixels"][0, 0], torch.tensor([3.0, 0.0], dtype=torch.float64))
