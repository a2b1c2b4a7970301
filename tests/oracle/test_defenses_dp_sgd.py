"""DP-SGD against a loop over single examples, and its budget against known numbers."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gia_bench.defenses.dp_accounting import epsilon
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Buffers, Params, Update

CLIENTS, STEPS, EXAMPLES = 3, 2, 5


def victim(*middle: nn.Module, training: bool = True) -> Victim:
    with seeded(0, "model"):
        network = nn.Sequential(nn.Conv2d(1, 4, 3), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    return Victim(module=network, input_shape=(1, 8, 8), num_classes=3, training=training)


def batches() -> Batch:
    g = stream(0, "images")
    shape = (CLIENTS, STEPS, EXAMPLES)
    mask = torch.ones(shape, dtype=torch.float64)
    mask[1, :, 3:] = 0
    mask[2, 1, 1:] = 0
    inputs = torch.rand(*shape, 1, 8, 8, generator=g, dtype=torch.float64)
    return Batch(inputs, torch.randint(3, shape, generator=g), mask)


def one(client: int, step: int) -> Batch:
    return Batch(*(t[client, step] for t in batches()))


def loss_of(model: Victim, buffers: Buffers) -> Any:
    return lambda params, batch: model.objective(params, buffers, batch)


def by_hand(model: Victim, params: Params, batch: Batch, max_norm: float) -> Update:
    """One backward pass per real example, torch's own clipping, then the mean."""
    rows: list[list[Tensor]] = []
    for i in torch.nonzero(batch.mask).view(-1).tolist():
        weights = [p.clone().requires_grad_() for p in params.values()]
        logits = torch.func.functional_call(
            model.module, dict(zip(params, weights, strict=True)), batch.inputs[i : i + 1]
        )
        nn.functional.cross_entropy(logits, batch.labels[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        norm = math.sqrt(sum(float((w.grad**2).sum()) for w in weights if w.grad is not None))
        rows.append([w.grad * min(1.0, max_norm / norm) for w in weights if w.grad is not None])
    return {k: torch.stack([row[j] for row in rows]).mean(0) for j, k in enumerate(params)}


@pytest.mark.parametrize("client", range(CLIENTS))
@pytest.mark.parametrize("max_norm", [0.3, 2.0, 1e6])
def test_a_noiseless_gradient_is_the_mean_of_clipped_single_gradients(client: int, max_norm: float) -> None:
    model, batch = victim(nn.GroupNorm(2, 4)), one(client, 1)
    params, buffers = model.initial()
    defense = DPSGD(max_grad_norm=max_norm, noise_multiplier=0)
    noise = defense.draw(params, Batch(*(t[client] for t in batches())), stream(0))
    gradient, after, loss = defense.gradient(loss_of(model, buffers), params, batch, noise, 1)
    for name, expected in by_hand(model, params, batch, max_norm).items():
        assert torch.allclose(gradient[name], expected, rtol=1e-6, atol=1e-12)
    assert after == {}
    assert loss == pytest.approx(float(model.objective(params, buffers, batch)[0]))


def test_a_bound_that_nothing_reaches_gives_the_plain_gradient() -> None:
    model = victim()
    params, buffers = model.initial()
    defense = DPSGD(max_grad_norm=1e6, noise_multiplier=0)
    noise = defense.draw(params, one(0, 0), stream(0))
    plain = torch.func.grad(lambda p: model.objective(p, buffers, one(1, 0))[0])(params)
    gradient, _, _ = defense.gradient(loss_of(model, buffers), params, one(1, 0), noise, 0)
    assert all(torch.allclose(gradient[k], g) for k, g in plain.items())


def test_padding_contributes_nothing_whatever_it_holds() -> None:
    model = victim()
    params, buffers = model.initial()
    batch = one(1, 0)
    noise = DPSGD().draw(params, one(0, 0), stream(0))
    cut = Batch(*(t[:3] for t in batch))
    padded, _, _ = DPSGD().gradient(loss_of(model, buffers), params, batch, noise, 0)
    exact, _, _ = DPSGD().gradient(loss_of(model, buffers), params, cut, noise, 0)
    assert all(torch.allclose(padded[k], g, atol=1e-12) for k, g in exact.items())


def test_the_noise_has_the_stated_deviation_and_every_step_its_own() -> None:
    model = victim()
    params, buffers = model.initial()
    whole = Batch(*(t[1] for t in batches()))
    defense, silent = DPSGD(max_grad_norm=0.5, noise_multiplier=8.0), DPSGD(max_grad_norm=0.5, noise_multiplier=0)
    noise = defense.draw(params, whole, stream(0, "noise"))
    assert len(noise) == STEPS * len(params)
    errors = []
    for step in range(STEPS):
        batch = Batch(*(t[step] for t in whole))
        noisy, _, _ = defense.gradient(loss_of(model, buffers), params, batch, noise, step)
        clean, _, _ = silent.gradient(loss_of(model, buffers), params, batch, noise, step)
        errors.append(torch.cat([(noisy[k] - clean[k]).view(-1) for k in params]))
    # 3 real examples; 475 draws: a standard error of 3.3 % of the deviation
    for error in errors:
        assert float(error.std()) == pytest.approx(0.5 * 8.0 / 3, rel=0.15)
    assert abs(float(torch.corrcoef(torch.stack(errors))[0, 1])) < 0.2


@pytest.mark.parametrize(
    "local", [FedSGD(batch_size=None), FedAvg(learning_rate=0.1, batch_size=5)], ids=["sgd", "avg"]
)
def test_a_loop_and_vmap_over_clients_give_equal_updates(local: FedSGD | FedAvg) -> None:
    defense, model = DPSGD(), victim(nn.GroupNorm(2, 4))
    params, buffers = model.initial()
    everything = batches()
    noises = [defense.draw(params, Batch(*(t[c] for t in everything)), stream(0, c)) for c in range(CLIENTS)]

    def run(batch: Batch, noise: dict[str, Tensor]) -> Update:
        return local.run(model, defense, params, buffers, batch, noise, None).update

    stacked = {k: torch.stack([n[k] for n in noises]) for k in noises[0]}
    together = torch.vmap(run)(everything, stacked)
    for c in range(CLIENTS):
        alone = run(Batch(*(t[c] for t in everything)), noises[c])
        assert all(torch.allclose(together[k][c], u, atol=1e-10) for k, u in alone.items())


def test_batch_norm_is_refused_in_training_mode_with_the_way_out_and_works_in_evaluation_mode() -> None:
    for training in (True, False):
        model = victim(nn.BatchNorm2d(4), training=training)
        params, buffers = model.initial()
        noise = DPSGD().draw(params, one(0, 0), stream(0))
        if training:
            with pytest.raises(IncompatibleError, match=r"BatchNorm in training mode.*GroupNorm.*model.training=false"):
                DPSGD().check_victim(model)
        else:
            DPSGD().check_victim(model)
            gradient, after, _ = DPSGD().gradient(loss_of(model, buffers), params, one(0, 0), noise, 0)
            assert all(g.isfinite().all() for g in gradient.values())
            assert {k: b.shape for k, b in after.items()} == {k: b.shape for k, b in buffers.items()}


def test_the_budget_of_full_batches_is_that_of_the_gaussian_mechanism() -> None:
    # Renyi differential privacy of n Gaussian steps is n alpha / (2 sigma^2), converted at the best alpha
    sigma, num_steps, delta = 5.0, 20, 1e-5
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64))
    by_hand = min(
        num_steps * a / (2 * sigma**2) - (math.log(delta) + math.log(a)) / (a - 1) + math.log((a - 1) / a)
        for a in orders
    )
    spent = epsilon(noise_multiplier=sigma, sample_rate=1.0, num_steps=num_steps, delta=delta)
    assert spent.epsilon == pytest.approx(by_hand, rel=1e-3)
    assert not spent.nominal
    tighter = epsilon(noise_multiplier=sigma, sample_rate=1.0, num_steps=num_steps, delta=delta, accountant="prv")
    # the exact curve of the composed Gaussian mechanism (Balle and Wang 2018): delta(epsilon) = the delta asked for
    mu = math.sqrt(num_steps) / sigma

    def delta_of(eps: float) -> float:
        first, second = (math.erfc((eps / mu - s * mu / 2) / math.sqrt(2)) / 2 for s in (1, -1))
        return first - math.exp(eps) * second

    assert delta_of(tighter.epsilon * 1.02) < delta < delta_of(tighter.epsilon * 0.98)


def test_more_noise_and_fewer_steps_spend_less_and_shuffled_batches_are_nominal() -> None:

    def spent(sigma: float, steps: int) -> float:
        return epsilon(noise_multiplier=sigma, sample_rate=0.01, num_steps=steps, delta=1e-5).epsilon

    assert spent(2, 100) < spent(1, 100) < spent(1, 1000)
    assert epsilon(noise_multiplier=1, sample_rate=0.01, num_steps=10, delta=1e-5).nominal
    assert not epsilon(noise_multiplier=1, sample_rate=0.01, num_steps=10, delta=1e-5, poisson=True).nominal


def test_without_opacus_the_budget_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ConfigError, match="pip install opacus"):
        epsilon(noise_multiplier=1, sample_rate=0.01, num_steps=10, delta=1e-5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"noise_multiplier": 0}, "noise_multiplier=0 must be above 0"),
        ({"sample_rate": 1.5}, r"sample_rate=1.5 must lie in \(0, 1\]"),
        ({"num_steps": 0}, "num_steps=0 must be a whole number"),
        ({"num_steps": 2.5}, "num_steps=2.5 must be a whole number"),
        ({"delta": 1}, r"delta=1 must lie in \(0, 1\)"),
        ({"accountant": "gdp"}, "accountant='gdp' is not known. Choose one of: prv, rdp"),
    ],
)
def test_a_budget_out_of_range_is_refused_with_a_sentence(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        epsilon(**({"noise_multiplier": 1.0, "sample_rate": 0.1, "num_steps": 1, "delta": 1e-5} | changed))
