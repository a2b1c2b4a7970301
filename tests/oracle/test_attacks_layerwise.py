"""Gradients of many clients in one pass against one backward pass for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from attack_problems import problem
from torch import Tensor, nn
from torch.nn import functional as F

from gia_bench.attacks.distances import Cosine, Distance, Euclidean
from gia_bench.attacks.group import Group
from gia_bench.attacks.layerwise import explained, gradients
from gia_bench.attacks.priors import (
    IsotropicTotalVariation,
    Norm,
    PaddedTotalVariation,
    PixelRange,
    Prior,
    TotalVariation,
)
from gia_bench.attacks.replay import LocalSteps, OneStep
from gia_bench.attacks.scene import Candidate, PixelSpace, Scene
from gia_bench.errors import IncompatibleError
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.models.functional import Penalised, Victim
from gia_bench.values import Batch

SHAPE, CLASSES, CLIENTS, EXAMPLES = (2, 6, 6), 3, 3, 2


class Twice(nn.Module):
    """One linear layer used twice, the second time on tokens, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle = nn.Linear(6, 6), nn.Linear(2, 2)
        self.head = nn.Linear(72, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).sigmoid()).sigmoid().flatten(1))


class WithPenalty(nn.Module):
    """A loss of its own beside the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Penalised:
        out = self.fc(x.flatten(1))
        return Penalised(out, out.square().sum(-1))


def body(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Sigmoid(), nn.Flatten(), nn.Linear(features, CLASSES))


EXPLAINED: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: body(nn.Conv2d(2, 4, 3, 2, 1), features=36),
    "grouped": lambda: body(nn.Conv2d(2, 4, 3, groups=2, dilation=2, bias=False), features=16),
    "uneven": lambda: body(nn.Conv2d(2, 4, (3, 2), (1, 2), (1, 0)), features=72),
    "reflected": lambda: body(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), features=144),
    "written into": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES)),
    "group norm": lambda: body(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), features=64),
    "layer norm": lambda: body(nn.Conv2d(2, 4, 3), nn.LayerNorm([4, 4, 4]), features=64),
    "layer norm of rows": lambda: body(nn.LayerNorm(6), features=72),
    "no factors": lambda: body(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, affine=False), features=64),
    "batch norm": lambda: body(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), features=64),
    "twice": Twice,
    "penalty": WithPenalty,
}


class Changed(nn.Module):
    """Weights that pass through something before a layer takes them."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.ones(CLASSES, 72)), change

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.change(self.weight))


class Tokens(nn.Module):
    """A layer that sees every row of an image as an example."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Linear(6, 6), nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x.flatten(0, 2)).view(len(x), 72))


class Recurrent(nn.Module):
    """Weights that are handed on in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(6, 3, batch_first=True), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x.flatten(1, 2))[0].flatten(1))


class Gates(nn.Module):
    """Factors that are taken out of one parameter."""

    def __init__(self, take: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.gates, self.head, self.take = nn.Parameter(torch.ones(2)), nn.Linear(72, CLASSES), take

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.take(self.gates)
        return self.head((x * one).sigmoid().flatten(1) + 0.01 * other)


class Constants(nn.Module):
    """A layer that sees a buffer, and no image."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.head, self.inner = nn.Linear(72, CLASSES), nn.Linear(2, CLASSES)
        self.register_buffer("seen", torch.ones(rows, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) + self.inner(self.seen).mean(0)


class Mean(nn.Module):
    """An example that sees the others."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.head, self.keep = nn.Linear(72, CLASSES), keep

    def forward(self, x: Tensor) -> Tensor:
        mean = self.head(x.flatten(1).mean(0, keepdim=True))
        return self.head(x.flatten(1) - x.flatten(1).mean(0)) if self.keep else self.head(x.flatten(1)) + mean


STRANGE: dict[str, Callable[[], nn.Module]] = {
    "doubled": lambda: Changed(lambda w: 2 * w),
    "transposed twice": lambda: Changed(lambda w: w.T.T),
    "a view": lambda: Changed(lambda w: w[:]),
    "stacked": lambda: Changed(lambda w: torch.stack([w])[0]),
    "concatenated": lambda: Changed(lambda w: torch.cat([w[:1], w[1:]])),
    "in a list": Recurrent,
    "in halves": lambda: Gates(lambda gates: gates.chunk(2)),
    "one by one": lambda: Gates(list),
    "two constant rows": lambda: Constants(2),
    "three constant rows": lambda: Constants(3),
    "the mean of all": lambda: Mean(keep=False),
    "less the mean of all": lambda: Mean(keep=True),
    "statistics of all": lambda: body(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False, track_running_stats=False), features=64
    ),
    "tokens as examples": Tokens,
    "a convolution in one dimension": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(72, CLASSES)
    ),
    "padded by a word": lambda: body(nn.Conv2d(2, 4, 3, padding="same"), features=144),
    "instance norm": lambda: body(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), features=64),
}


def victim_of(make: Callable[[], nn.Module], training: bool = False) -> Victim:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = make().double()
        for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            nn.init.uniform_(tensor, 0.2, 0.9)
    return Victim(module=module, input_shape=SHAPE, num_classes=CLASSES, training=training)


def drawn(clients: int = CLIENTS) -> Batch:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(clients, EXAMPLES, *SHAPE, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (clients, EXAMPLES), generator=draw)
    mask = torch.ones(clients, EXAMPLES, dtype=torch.float64)
    mask[0, 1] = 0  # padding
    return Batch(inputs, labels, mask)


@pytest.mark.parametrize("clients", [CLIENTS, 1])
@pytest.mark.parametrize("name", EXPLAINED)
def test_every_clients_gradient_and_its_slope_equal_a_loop(name: str, clients: int) -> None:
    victim, batch = victim_of(EXPLAINED[name]), drawn(clients)
    params, buffers = victim.initial()
    assert explained(victim, params, buffers)
    inputs = batch.inputs.clone().requires_grad_()
    found = gradients(victim, params, buffers, batch._replace(inputs=inputs))

    own = batch.inputs.clone().requires_grad_()
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    rows = []
    for n in range(clients):
        loss = victim.objective(leaves, buffers, Batch(own[n], batch.labels[n], batch.mask[n]))[0]
        rows.append(
            torch.autograd.grad(
                loss, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
        )
    expected = {k: torch.stack([row[i] for row in rows]) for i, k in enumerate(leaves)}
    weights = {k: torch.randn_like(p) for k, p in expected.items()}
    assert found.keys() == expected.keys()
    for k in expected:
        torch.testing.assert_close(found[k], expected[k], rtol=1e-9, atol=1e-12)
    slopes = (
        torch.autograd.grad(sum((u[k] * weights[k]).sum() for k in u), x)[0]
        for u, x in ((found, inputs), (expected, own))
    )
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", STRANGE)
def test_what_has_no_rule_is_noticed(name: str) -> None:
    victim = victim_of(STRANGE[name])
    assert not explained(victim, *victim.initial())


def test_a_batchs_own_statistics_are_not_taken_apart() -> None:
    victim = victim_of(EXPLAINED["batch norm"], training=True)
    assert not explained(victim, *victim.initial())
    with pytest.raises(IncompatibleError, match="uses its parameters in a way"):
        gradients(victim, *victim.initial(), drawn()._replace(inputs=drawn().inputs.requires_grad_()))


@pytest.mark.parametrize("zero", ["neither", "dummy", "observed"])
def test_cosines_of_many_and_their_slopes_equal_one_at_a_time(zero: str) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"w": (4, 3), "b": (4,), "temperature": ()}
    dummies = {k: torch.randn(2, 3, *s, generator=draw, dtype=torch.float64) for k, s in shapes.items()}
    observed = {k: torch.randn(2, *s, generator=draw, dtype=torch.float64) for k, s in shapes.items()}
    for update in {"neither": [], "dummy": [dummies], "observed": [observed]}[zero]:
        for t in update.values():
            t[0] = 0  # of the first victim
    many, each = ({k: t.clone().requires_grad_() for k, t in dummies.items()} for _ in range(2))
    found = Cosine().of_many(many, observed)
    rows = [
        [Cosine()({k: each[k][v, t] for k in each}, {k: u[v] for k, u in observed.items()}) for t in range(3)]
        for v in range(2)
    ]
    expected = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(found, expected)
    weights = torch.randn(2, 3, generator=draw, dtype=torch.float64)
    slopes = [
        torch.autograd.grad((loss * weights).sum(), list(u.values())) for loss, u in ((found, many), (expected, each))
    ]
    for one, other in zip(*slopes, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


def several() -> tuple[tuple[str, dict[str, object]], ...]:
    return (
        ("a gradient", {}),
        ("labels are searched", {"joint": True}),
        ("the sum of two clients", {"num_clients": 2}),
        ("an expected number of examples", {"local": FedSGD(batch_size=3, sampling="poisson")}),
        ("fewer tensors", {"shown": 2}),
        ("one learning rate times a gradient", {"local": FedAvg(learning_rate=0.1, batch_size=2), "replay": OneStep()}),
    )


@pytest.mark.parametrize("distance", [Cosine(), Euclidean()], ids=repr)
@pytest.mark.parametrize(("name", "setting"), several(), ids=[name for name, _ in several()])
def test_losses_and_gradients_layer_by_layer_are_those_of_mapped_candidates(
    name: str, setting: dict[str, object], distance: Distance
) -> None:
    """The way itself, not what is taken after it has been compared."""
    p = problem(2, batch=2, normalised=True, dtype=torch.float64)
    seen = [
        dataclasses.replace(
            o,
            num_clients=setting.get("num_clients", 1),
            local=setting.get("local"),
            update=dict(list(o.update.items())[: setting.get("shown", 9)]),
        )  # type: ignore[arg-type, misc]
        for o in p.observations
    ]
    joint = setting.get("joint", False)
    labels = [None, None] if joint else list(p.labels)
    space, priors = PixelSpace.of(p.victim, p.images), {"tv": TotalVariation(weight=0.1)}
    replay = setting.get("replay", LocalSteps())
    group = Group.of(seen, p.victim, labels, space, distance, priors, None, None, replay)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(5)
    start = {"pixels": torch.randn(2, 3, *p.images.shape[1:], generator=draw, dtype=torch.float64)}
    if joint:
        start["labels"] = torch.randn(2, 3, 2, 4, generator=draw, dtype=torch.float64)
    assert group.replay.multiple(group.template) is not None
    with torch.no_grad():
        sure = group.evaluate(start)
        found = dataclasses.replace(group, step=group._layerwise_step).evaluate(start)
    torch.testing.assert_close(found, sure, rtol=1e-9, atol=1e-12)


PRIORS: list[Prior] = [
    TotalVariation(weight=0.3),
    PaddedTotalVariation(weight=0.3),
    PaddedTotalVariation(weight=0.3, inner=2.0, outer=0.5, double_opponents=True),
    IsotropicTotalVariation(weight=0.3),
    PixelRange(weight=0.3),
    Norm(weight=0.3),
]


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_priors_that_take_leading_axes_give_each_candidate_its_own_penalty(prior: Prior) -> None:
    pixels = torch.randn(2, 3, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, scene = torch.zeros(2, 3, 4), Scene(victim_of(Twice), None)  # type: ignore[arg-type]  # looked at by none
    assert prior.leading_axes
    assert {type(p) for p in PRIORS} == {c for c in Prior.__subclasses__() if c.leading_axes}
    many = prior(Candidate(pixels, pixels, labels), scene)
    rows = [
        [prior(Candidate(x, x, y), scene) for x, y in zip(*pair, strict=True)]
        for pair in zip(pixels, labels, strict=True)
    ]
    torch.testing.assert_close(many, torch.stack([torch.stack(row) for row in rows]))
