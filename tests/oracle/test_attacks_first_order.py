"""The batched Adam and SGD against those of ``torch.optim``, one candidate at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.optimizers import SGD, Adam, Moment, Optimizer, Raw, Sign, SoftSign, Transform, Variables
from gia_bench.attacks.plateau import Plateau
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


Oracle = Callable[[list[Tensor]], torch.optim.Optimizer]
BOUNCING: list[tuple[Optimizer, Oracle]] = [
    (SGD(lr=0.12), lambda x: torch.optim.SGD(x, lr=0.12)),
    (SGD(lr=0.095, momentum=0.9), lambda x: torch.optim.SGD(x, lr=0.095, momentum=0.9)),
    (Adam(lr=0.5), lambda x: torch.optim.Adam(x, lr=0.5)),
    (LBFGS(max_iter=2, max_eval=9), lambda x: torch.optim.LBFGS(x, max_iter=2, max_eval=9, history_size=100)),
]


@pytest.mark.parametrize(("inner", "oracle"), BOUNCING, ids=["sgd", "momentum", "adam", "lbfgs"])
@pytest.mark.parametrize(("patience", "threshold"), [(0, 0.05), (2, 1e-4)])
def test_a_rate_of_its_own_equals_torchs_on_plateau_candidate_by_candidate(
    inner: Optimizer, oracle: Oracle, patience: int, threshold: float
) -> None:
    """Candidates reach their plateaus at different steps, under a common schedule that halves the rate half-way."""
    start = 3 * torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def valley(x: Tensor) -> Tensor:
        return loss(x) + (1 + x.cos()).sum(-1)

    def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        x = variables["pixels"].clone().requires_grad_()
        with torch.enable_grad():
            values = valley(x)
            gradient = torch.autograd.grad(values.sum(), x)[0]
        return values.detach(), {"pixels": gradient}

    optimizer = Plateau(optimizer=inner, factor=0.3, patience=patience, threshold=threshold)
    variables: Variables = {"pixels": start}
    state, rates = optimizer.init(variables), []
    for step in range(STEPS):
        move = optimizer.step(variables, state, evaluate, Moment(step, STEPS, 1.0 if step < STEPS // 2 else 0.5))
        variables, state = move.variables, move.state
        rates.append(state["rate"])

    fell = 0
    for v in range(3):
        for t in range(2):
            x = start[v, t].clone().requires_grad_()
            own = oracle([x])
            lr = own.param_groups[0]["lr"]
            decay = torch.optim.lr_scheduler.ReduceLROnPlateau(
                own, factor=0.3, patience=patience, threshold=threshold, eps=0.0
            )
            for step in range(STEPS):

                def closure(x: Tensor = x) -> Tensor:
                    value = valley(x)
                    x.grad = torch.autograd.grad(value, x)[0]
                    return value

                common, plain = (1.0 if step < STEPS // 2 else 0.5), own.param_groups[0]["lr"]
                own.param_groups[0]["lr"] = plain * common
                before = own.step(closure).detach()  # type: ignore[arg-type]
                own.param_groups[0]["lr"] = plain
                decay.step(float(before))  # type: ignore[arg-type]
                assert float(rates[step][v, t]) == pytest.approx(own.param_groups[0]["lr"] / lr)
            fell += own.param_groups[0]["lr"] < lr
            torch.testing.assert_close(variables["pixels"][v, t], x.detach(), rtol=1e-6, atol=1e-8)
    assert fell, "no candidate reached a plateau, so that nothing was compared"
    assert len({tuple(r.flatten().tolist()) for r in rates}) > 1


def test_a_plateau_in_a_plateau_has_two_rates() -> None:
    """Both fall at their own time, and what is left of the rate is their product."""

    def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        x = variables["pixels"]
        return torch.ones(x.shape[:2]), {"pixels": torch.ones_like(x)}  # a loss that never falls

    inner = Plateau(optimizer=SGD(lr=1.0), factor=0.5, patience=0)
    optimizer, variables = Plateau(optimizer=inner, factor=0.1, patience=1), {"pixels": torch.zeros(1, 1, 1)}
    state, way = optimizer.init(variables), []
    for step in range(4):
        move = optimizer.step(variables, state, evaluate, Moment(step, 4, 1.0))
        way.append(float(variables["pixels"] - move.variables["pixels"]))
        variables, state = move.variables, move.state
    # the first loss is a fall from infinity; then the inner one falls after every step, the outer one after every other
    assert way == pytest.approx([1.0, 1.0, 0.5, 0.25 * 0.1], rel=1e-4)


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"patience": -1}, {"threshold": 1.0}])
def test_a_plateau_refuses_what_means_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Plateau(optimizer=Adam(), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"nesterov": True}])
def test_sgd_refuses_what_does_not_descend(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SGD(**wrong)  # type: ignore[arg-type]
