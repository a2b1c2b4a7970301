"""DP-SGD against a loop over single examples, and its budget against known numbers."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dp_accounting import epsilon
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.noise import Gaussian, GaussianNoise
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.pruning.none import NoPruning
from gia_bench.pruning.pruned import Pruned
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Buffers, Observation, Params, Update

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


def sent_and_seen(
    local: LocalWork, batch: Batch, defense: DPSGD, seed: int = 0, **shown: Any
) -> tuple[Victim, Update, Observation]:
    """What one client with ``batch`` [S, B, ...] sends, and what an attacker who knows the defense holds."""
    model = victim()
    params, buffers = model.initial()
    update = local.run(model, defense, params, buffers, batch, defense.draw(params, batch, stream(seed)), None).update
    count = int(batch.mask[0].sum())
    seen = Observation(params=params, update=update, num_examples=count, local=local, defense=defense, **shown)
    return model, update, seen


ONE_STEP: list[LocalWork] = [
    FedSGD(batch_size=None), FedSGD(batch_size=8, sampling="poisson"), FedAvg(learning_rate=0.1, batch_size=None),
    FedAvg(learning_rate=0.1, epochs=None, steps=1, batch_size=8, sampling="poisson"),
]  # fmt: skip


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
@pytest.mark.parametrize("local", ONE_STEP[:2], ids=repr)
def test_the_stand_in_of_the_true_gradient_of_one_example_is_what_was_sent(local: LocalWork, max_norm: float) -> None:
    single = Batch(*(t[None, :1] for t in one(0, 0)))
    model, sent, seen = sent_and_seen(local, single, DPSGD(max_grad_norm=max_norm, noise_multiplier=0))
    true = local.simulate(model, seen.params, {}, [Batch(*(t[0] for t in single))])
    found = DPSGD(max_grad_norm=max_norm).surrogate(true, seen)
    assert all(torch.allclose(found[k], u, rtol=1e-6, atol=1e-12) for k, u in sent.items())


@pytest.mark.parametrize("local", ONE_STEP[:2], ids=repr)
def test_no_stand_in_and_nothing_sent_without_noise_is_longer_than_clipping_allows(local: LocalWork) -> None:
    bound = 0.2
    whole = Batch(*(t[:1] for t in (t[0] for t in batches())))
    model, sent, seen = sent_and_seen(local, whole, DPSGD(max_grad_norm=bound, noise_multiplier=0))
    true = local.simulate(model, seen.params, {}, [Batch(*(t[0] for t in whole))])
    allowed = bound * (1 if local.sampling == "shuffled" else EXAMPLES / 8)
    for update in (sent, DPSGD(max_grad_norm=bound).surrogate(true, seen)):
        assert math.sqrt(sum(float(u.square().sum()) for u in update.values())) <= allowed * (1 + 1e-6)

    def length(scale: Tensor) -> Tensor:
        own = DPSGD(max_grad_norm=bound).surrogate({k: scale * u for k, u in true.items()}, seen)
        return torch.stack([u.square().sum() for u in own.values()]).sum().sqrt()

    slopes = torch.vmap(torch.func.grad(length))(torch.tensor([1e-3, 0.0, 100.0], dtype=torch.float64))
    assert slopes[0] > 0 and slopes[2].abs() < 1e-9  # within the bound the dummy's own, beyond it that of a constant


def test_local_steps_have_no_stand_in_but_themselves() -> None:
    local = FedAvg(learning_rate=0.1, epochs=2, batch_size=None)
    update = {"w": 100 * torch.ones(4)}
    assert DPSGD().surrogate(update, Observation(params={}, update=update, local=local, num_examples=2)) is update


@pytest.mark.parametrize("local", ONE_STEP, ids=repr)
def test_the_law_of_the_noise_in_one_step_is_that_of_what_was_sent(local: LocalWork) -> None:
    whole = Batch(*(t[:1] for t in (t[0] for t in batches())))
    defense, quiet = DPSGD(max_grad_norm=0.5, noise_multiplier=3.0), DPSGD(max_grad_norm=0.5, noise_multiplier=0)
    _, clean, _ = sent_and_seen(local, whole, quiet)
    errors = []
    for seed in range(10):
        _, sent, seen = sent_and_seen(local, whole, defense, seed)
        errors += [(sent[k] - clean[k]).flatten() for k in sent]
    law = defense.noise_law(seen)
    assert isinstance(law, Gaussian)
    assert float(torch.cat(errors).std()) == pytest.approx(law.sigma, rel=0.05)
    assert quiet.noise_law(seen) is None
    assert defense.noise_law() is None and defense.noise_law(dataclasses.replace(seen, num_examples=None)) is None
    # two clients with as many examples each: independent noises, averaged
    both = defense.noise_law(dataclasses.replace(seen, num_clients=2, num_examples=2 * EXAMPLES))
    assert isinstance(both, Gaussian) and both.sigma == pytest.approx(law.sigma / math.sqrt(2))


def test_several_steps_have_no_simple_law_and_a_chain_knows_whose_noise_comes_first() -> None:
    several = FedAvg(learning_rate=0.1, epochs=2, batch_size=None)
    defense = DPSGD()
    seen = Observation(params={}, update={}, num_examples=4, local=several, defense=defense)
    assert defense.noise_law(seen) is None
    seen = dataclasses.replace(seen, local=FedSGD())
    assert defense.noise_law(seen) == Gaussian(1 / 4)
    assert Chain(stages={"dp": defense}).noise_law(seen) == Gaussian(1 / 4)
    for stages in ({"clip": ClipUpdate(), "dp": defense}, {"dp": defense, "clip": ClipUpdate()}):
        assert Chain(stages=stages).noise_law(seen) is None  # wherever it is written, the clip shortens the noise too
    noisy: dict[str, Defense] = {"noise": GaussianNoise(scale=0.1), "dp": defense}
    assert Chain(stages=noisy).noise_law(seen) is None
    assert Pruned(inner=defense, method=NoPruning()).noise_law(seen) == Gaussian(1 / 4)


def test_a_chain_computes_the_gradient_before_it_protects_it_in_its_stand_in_too() -> None:
    true, sent = {"w": torch.tensor([3.0, 4.0, 0.0])}, {"w": torch.tensor([0.0, 0.8, 0.0])}
    seen = Observation(params={}, update=sent, num_examples=1, local=FedSGD())
    first: dict[str, Defense] = {"dp": DPSGD(max_grad_norm=1.0), "top": TopK(keep=0.34)}
    for stages in (first, dict(reversed(first.items()))):
        assert torch.allclose(Chain(stages=stages).surrogate(true, seen)["w"], sent["w"])
