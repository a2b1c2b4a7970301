"""Outpost against numpy, step by step, as the paper describes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gia_bench.defenses.outpost import Outpost
from gia_bench.errors import ConfigError
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Noise, Observation, Params, Update

CLIENTS, STEPS, EXAMPLES = 3, 2, 4
ALWAYS: dict[str, Any] = {"beta": 0.0}


def victim() -> Victim:
    with seeded(0, "model"):
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    with torch.no_grad():
        list(network.parameters())[2].mul_(40)  # a variance above 1, which is cut
    return Victim(module=network, input_shape=(1, 8, 8), num_classes=3)


def batches() -> Batch:
    g, shape = stream(0, "images"), (CLIENTS, STEPS, EXAMPLES)
    inputs = torch.rand(*shape, 1, 8, 8, generator=g, dtype=torch.float64)
    return Batch(inputs, torch.randint(3, shape, generator=g), torch.ones(shape, dtype=torch.float64))


def of_client(client: int) -> Batch:
    return Batch(*(t[client] for t in batches()))


def gradient_of(model: Victim, params: Params, batch: Batch) -> Update:
    gradient: Update = torch.func.grad(lambda p: model.objective(p, {}, batch)[0])(params)
    return gradient


def loss_of(model: Victim) -> Any:
    return lambda params, batch: model.objective(params, {}, batch)


def by_hand(
    gradient: Update, params: Params, normal: Noise, phi: float, prune: float, base: float
) -> dict[str, np.ndarray]:
    fisher = {k: (g.numpy() ** 2).mean(0) for k, g in gradient.items()}
    threshold = np.percentile(np.concatenate([f.reshape(-1) for f in fisher.values()]), 100 - phi)
    sent = {}
    for k, g in gradient.items():
        values = g.numpy()
        pruned = np.where(np.abs(values) < np.percentile(np.abs(values), prune), 0, values)
        risk = min(params[k].numpy().var(ddof=1), 1)
        sent[k] = pruned + risk * base * normal[k].numpy() * (fisher[k] >= threshold)
    return sent


@pytest.mark.parametrize(("phi", "base"), [(0.4, 0.8), (0.1, 0.1), (1.0, 0.5)])
@pytest.mark.parametrize("prune", [0.8, 0.5, 0.0])
def test_a_perturbed_gradient_is_that_of_numpys_percentiles_and_changes_the_update(
    phi: float, base: float, prune: float
) -> None:
    model, batch = victim(), of_client(0)
    params, _ = model.initial()
    assert float(params["3.weight"].var()) > 1 > float(params["0.weight"].var())
    defense = Outpost(phi=phi, prune=prune, noise_base=base, **ALWAYS)
    noise = defense.draw(params, batch, stream(0, "noise"))
    plain = gradient_of(model, params, Batch(*(t[1] for t in batch)))
    got = defense.perturbed(plain, params, {k: noise[f"1.{k}"] for k in params})
    expected = by_hand(plain, params, {k: noise[f"1.{k}"].double() for k in params}, 100 * phi, 100 * prune, base)
    for k in params:
        np.testing.assert_allclose(got[k].numpy(), expected[k], rtol=1e-12)
    # the reference's newest code computes the noise and then sends the gradient as it was
    sent, _, _ = defense.gradient(loss_of(model), params, Batch(*(t[1] for t in batch)), noise, 1)
    assert all(torch.equal(sent[k], got[k]) and not torch.equal(sent[k], plain[k]) for k in params)


def test_a_bias_is_noised_as_a_whole_or_not_at_all_and_a_weight_by_its_inputs() -> None:
    defense = Outpost(phi=0.5, prune=0.0, noise_base=1.0, **ALWAYS)
    # Fisher information: inputs 4 and 1 of the weight, 9 of the bias "loud", 0.01 of the bias "quiet"
    gradient = {
        "weight": torch.tensor([[2.0, 1.0], [-2.0, -1.0]]), "loud": torch.tensor([3.0, 3.0]),
        "quiet": torch.tensor([0.1, -0.1]),
    }  # fmt: skip
    params = {k: torch.linspace(0, 1, g.numel()).view(g.shape) for k, g in gradient.items()}
    normal = {k: torch.ones_like(g) for k, g in gradient.items()}
    changed = {k: s != gradient[k] for k, s in defense.perturbed(gradient, params, normal).items()}
    assert changed["weight"].tolist() == [[True, False], [True, False]]
    assert changed["loud"].tolist() == [True, True]
    assert changed["quiet"].tolist() == [False, False]


def test_tensors_of_one_entry_are_kept_without_noise() -> None:
    gradient = {"scalar": torch.tensor(2.0), "one": torch.tensor([3.0]), "many": torch.tensor([0.1, 0.2])}
    normal = {k: torch.ones_like(g) for k, g in gradient.items()}
    got = Outpost(phi=1.0, prune=0.5).perturbed(gradient, gradient, normal)
    assert (float(got["scalar"]), float(got["one"])) == (2.0, 3.0)
    assert all(g.isfinite().all() for g in got.values())


def test_the_probability_is_that_of_epoch_times_batch_plus_one() -> None:
    assert [Outpost().probability(s) for s in range(3)] == [1 / 1.125, 1 / 1.25, 1 / 1.375]
    iterations = [epoch * (batch + 1) for epoch in (1, 2) for batch in range(3)]
    assert iterations == [1, 2, 3, 2, 4, 6]
    assert [Outpost(steps_per_epoch=3).probability(s) for s in range(6)] == [1 / (1 + i / 8) for i in iterations]


def test_steps_are_perturbed_as_often_as_the_probability_says() -> None:
    model, batch = victim(), of_client(0)
    params, _ = model.initial()
    defense, draws = Outpost(beta=1.0), 150
    plain = [gradient_of(model, params, Batch(*(t[s] for t in batch))) for s in range(STEPS)]
    for step, probability in enumerate((1 / 2, 1 / 3)):
        changed = 0
        for number in range(draws):
            noise = defense.draw({}, batch, stream(0, number)) | {
                f"{step}.{k}": torch.ones_like(p) for k, p in params.items()
            }
            here = Batch(*(t[step] for t in batch))
            sent, _, _ = defense.gradient(loss_of(model), params, here, noise, step)
            changed += not all(torch.equal(sent[k], plain[step][k]) for k in params)
        # 150 draws: a standard error of 4 %
        assert changed / draws == pytest.approx(probability, abs=0.12)


@pytest.mark.parametrize(
    "local", [FedSGD(batch_size=None), FedAvg(learning_rate=0.1, batch_size=EXAMPLES)], ids=["sgd", "avg"]
)
def test_a_loop_and_vmap_over_clients_give_equal_updates_which_the_wire_keeps(local: LocalWork) -> None:
    defense, model = Outpost(beta=0.5), victim()
    params, _ = model.initial()
    noises = [defense.draw(params, of_client(c), stream(0, c)) for c in range(CLIENTS)]

    def run(batch: Batch, noise: dict[str, Tensor]) -> Update:
        return local.run(model, defense, params, {}, batch, noise, None).update

    together = torch.vmap(run)(batches(), {k: torch.stack([n[k] for n in noises]) for k in noises[0]})
    for c in range(CLIENTS):
        alone = run(of_client(c), noises[c])
        assert all(torch.allclose(together[k][c], u, atol=1e-10) for k, u in alone.items())
        decoded = defense.codec.decode(defense.codec.encode(alone, {}, EXAMPLES), params, {})
        assert all(torch.equal(decoded[k], u) for k, u in alone.items())


def test_an_attacker_who_knows_it_looks_only_where_something_was_sent() -> None:
    dummy = {"w": torch.tensor([1.0, 2.0, 3.0])}
    observed = Observation(params={}, update={"w": torch.tensor([0.0, 5.0, 0.0])})
    assert Outpost().surrogate(dummy, observed)["w"].tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"phi": 0}, r"phi=0 must lie in \(0, 1\]"),
        ({"phi": 40}, "0.4 means 40 %"),
        ({"prune": 1}, r"prune=1 must lie in \[0, 1\)"),
        ({"noise_base": -1}, "noise_base=-1 must be finite, at least 0"),
        ({"beta": float("inf")}, "beta=inf must be finite"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0 must be a whole number"),
    ],
)
def test_a_value_out_of_range_is_refused_with_a_sentence(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Outpost(**changed)
