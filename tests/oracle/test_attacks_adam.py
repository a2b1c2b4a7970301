"""The batched Adam against ``torch.optim.Adam``, one candidate at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gia_bench.attacks.optimizers import Adam, Moment, Raw, Sign, SoftSign, Transform, Variables
from gia_bench.attacks.schedules import StepDecay

STEPS = 40


def loss(x: Tensor) -> Tensor:
    """[..., n] -> [...]: a valley with curvatures from 0.01 to 10."""
    return (torch.logspace(-2, 1, x.shape[-1]) * (x - 1) ** 2).sum(-1)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (Raw(), lambda g, step: g),
        (Sign(), lambda g, step: g.sign()),
        (SoftSign(), lambda g, step: torch.tanh((1 - step / STEPS) * g) / (1 - step / STEPS)),
    ],
)
def test_adam_equals_torch_candidate_by_candidate(transform: Transform, shape: Callable[[Tensor, int], Tensor]) -> None:
    start = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    optimizer, schedule = Adam(lr=0.1, transform=transform), StepDecay()

    def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        x = variables["pixels"].clone().requires_grad_()
        with torch.enable_grad():
            values = loss(x)
            gradient = torch.autograd.grad(values.sum(), x)[0]
        return values.detach(), {"pixels": gradient}

    variables: Variables = {"pixels": start}
    state = optimizer.init(variables)
    for step in range(STEPS):
        move = optimizer.step(variables, state, evaluate, Moment(step, STEPS, schedule(step, STEPS)))
        variables, state = move.variables, move.state

    for v in range(3):
        for t in range(2):
            x = start[v, t].clone().requires_grad_()
            oracle = torch.optim.Adam([x], lr=0.1)
            decay = torch.optim.lr_scheduler.MultiStepLR(oracle, [15, 25, 35], gamma=0.1)
            for step in range(STEPS):
                x.grad = shape(torch.autograd.grad(loss(x), x)[0], step)
                oracle.step()
                decay.step()
            torch.testing.assert_close(variables["pixels"][v, t], x.detach(), rtol=1e-5, atol=1e-6)
