"""The batched Adam and SGD against those of ``torch.optim``, one candidate at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gia_bench.attacks.optimizers import SGD, Adam, Moment, Optimizer, Raw, Sign, SoftSign, Transform, Variables
from gia_bench.attacks.schedules import StepDecay
from gia_bench.errors import ConfigError

STEPS = 40


def loss(x: Tensor) -> Tensor:
    """[..., n] -> [...]: a valley with curvatures from 0.01 to 10."""
    return (torch.logspace(-2, 1, x.shape[-1]) * (x - 1) ** 2).sum(-1)


Shape = Callable[[Tensor, int], Tensor]
SHAPES: list[tuple[Transform, Shape]] = [
    (Raw(), lambda g, step: g),
    (Sign(), lambda g, step: g.sign()),
    (SoftSign(), lambda g, step: torch.tanh((1 - step / STEPS) * g) / (1 - step / STEPS)),
]


def hold(optimizer: Optimizer, oracle: Callable[[list[Tensor]], torch.optim.Optimizer], shape: Shape) -> None:
    """``optimizer`` on six candidates at once, and ``oracle`` on each of them."""
    start = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    schedule = StepDecay()

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
            own = oracle([x])
            decay = torch.optim.lr_scheduler.MultiStepLR(own, [15, 25, 35], gamma=0.1)
            for step in range(STEPS):
                x.grad = shape(torch.autograd.grad(loss(x), x)[0], step)
                own.step()
                decay.step()
            torch.testing.assert_close(variables["pixels"][v, t], x.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("transform", "shape"), SHAPES)
def test_adam_equals_torch_candidate_by_candidate(transform: Transform, shape: Shape) -> None:
    hold(Adam(lr=0.1, transform=transform), lambda x: torch.optim.Adam(x, lr=0.1), shape)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize(("transform", "shape"), SHAPES)
def test_sgd_equals_torch_candidate_by_candidate(
    transform: Transform, shape: Shape, momentum: float, nesterov: bool
) -> None:
    def oracle(x: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(x, lr=0.05, momentum=momentum, nesterov=nesterov)

    hold(SGD(lr=0.05, momentum=momentum, nesterov=nesterov, transform=transform), oracle, shape)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"nesterov": True}])
def test_sgd_refuses_what_does_not_descend(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SGD(**wrong)  # type: ignore[arg-type]
