"""CENSOR: its laws, and a loop over candidates with a real model in evaluation mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gia_bench.defenses.base import Client
from gia_bench.defenses.censor import Censor
from gia_bench.errors import ConfigError
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Noise, Observation, Update

CLIENTS, STEPS, EXAMPLES = 3, 2, 4


def victim() -> Victim:
    with seeded(0, "model"):
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3), nn.Linear(3, 3)
        )
    return Victim(module=network, input_shape=(1, 8, 8), num_classes=3, mean=torch.tensor([0.4]), std=torch.tensor([2]))


def client(number: int) -> Client:
    g, shape = stream(0, "images", number), (STEPS, EXAMPLES)
    mask = torch.ones(shape)
    mask[1, number + 1 :] = 0
    batch = Batch(torch.rand(*shape, 1, 8, 8, generator=g), torch.randint(3, shape, generator=g), mask)
    model = victim()
    return Client(model, *model.initial(), batch)


def update(number: int) -> Update:
    params, _ = victim().initial()
    return {k: torch.randn(p.shape, generator=stream(1, number, k)) for k, p in params.items()}


def candidate(v: np.ndarray, g: np.ndarray, power: int) -> np.ndarray:
    """The description, for one tensor."""
    v, g = v.astype(np.float64), g.astype(np.float64)
    v = v / np.linalg.norm(v)
    v = v - (v * g).sum() / np.linalg.norm(g) ** power * g
    return np.asarray(v / np.linalg.norm(v) * np.linalg.norm(g))


def best_by_hand(at: Client, own: Update, noise: Noise, power: int, trials: int) -> dict[str, np.ndarray]:
    found, least = {}, np.inf
    for trial in range(trials):
        turned = {k: candidate(noise[k][trial].numpy(), g.numpy(), power) for k, g in own.items()}
        network = victim().module.double().eval()
        with torch.no_grad():
            for k, p in network.named_parameters():
                p.sub_(1e-4 * torch.from_numpy(turned[k]))
        real = at.batch.mask.bool()
        logits = network((at.batch.inputs[real].double() - torch.tensor([0.4]).double()) / 2)
        loss = float(nn.functional.cross_entropy(logits, at.batch.labels[real]).detach())
        if loss < least:
            found, least = turned, loss
    return found


@pytest.mark.parametrize(("projection", "power"), [("corrected", 2), ("published", 1)])
@pytest.mark.parametrize("number", range(CLIENTS))
@pytest.mark.parametrize("candidates_at_once", [1, 3, 20])
def test_what_is_sent_is_the_candidate_of_lowest_loss_in_evaluation_mode(
    projection: str, power: int, number: int, candidates_at_once: int
) -> None:
    defense = Censor(projection=projection, trials=7, candidates_at_once=candidates_at_once)
    at, own = client(number), update(number)
    noise = defense.draw(at.params, at.batch, stream(2, number))
    sent, state = defense.protect(own, at, {}, {}, noise)
    expected = best_by_hand(at, own, noise, power, trials=7)
    assert state == {}
    for k, values in expected.items():
        np.testing.assert_allclose(sent[k].numpy(), values, rtol=1e-5, atol=1e-6)


def test_the_choice_depends_on_the_batch() -> None:
    at, own = client(0), update(0)
    noise = Censor().draw(at.params, at.batch, stream(2))
    sent, _ = Censor().protect(own, at, {}, {}, noise)
    others = [Censor().protect(own, client(c), {}, {}, noise)[0] for c in (1, 2)]
    assert any(not torch.equal(o["0.weight"], sent["0.weight"]) for o in others)


def test_corrected_is_at_right_angles_and_as_long_and_published_is_as_long_but_not_at_right_angles() -> None:
    at, own = client(0), update(0)
    noise = Censor().draw(at.params, at.batch, stream(2))
    corrected, _ = Censor().protect(own, at, {}, {}, noise)
    published, _ = Censor(projection="published").protect(own, at, {}, {}, noise)
    for k, g in own.items():
        length = float(g.norm())
        assert abs(float((corrected[k] * g).sum())) < 1e-5 * length**2
        assert float(corrected[k].norm()) == pytest.approx(length, rel=1e-5)
        assert float(published[k].norm()) == pytest.approx(length, rel=1e-5)
        assert abs(float((published[k] * g).sum())) > 1e-2 * length**2


@pytest.mark.parametrize(("length", "equal"), [(1.0, True), (0.5, False), (2.0, False)])
def test_published_equals_corrected_where_the_length_is_one_and_only_there(length: float, equal: bool) -> None:
    at, own = client(0), update(0)
    own = {k: length * g / g.norm() for k, g in own.items()}
    noise = Censor(trials=1).draw(at.params, at.batch, stream(2))
    corrected, _ = Censor(trials=1).protect(own, at, {}, {}, noise)
    published, _ = Censor(trials=1, projection="published").protect(own, at, {}, {}, noise)
    for k in own:
        assert torch.allclose(corrected[k], published[k], atol=1e-5) == equal


def test_a_zero_tensor_and_a_tensor_of_one_entry_are_sent_as_zero_and_nan_reaches_the_server() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Linear(1, 3))
    model = Victim(module=network, input_shape=(1, 2, 2), num_classes=3)
    params, buffers = model.initial()
    batch = Batch(torch.rand(1, 2, 1, 2, 2, generator=stream(0)), torch.tensor([[0, 2]]), torch.ones(1, 2))
    own = {k: torch.ones_like(p) for k, p in params.items()}
    own["1.weight"] = torch.zeros_like(own["1.weight"])
    own["2.bias"] = own["2.bias"] * torch.tensor([1.0, float("nan"), 1.0])
    noise = Censor().draw(params, batch, stream(2))
    sent, _ = Censor().protect(own, Client(model, params, buffers, batch), {}, {}, noise)
    assert sent["1.bias"].tolist() == [0.0]
    assert sent["1.weight"].tolist() == [[0.0] * 4]
    assert sent["2.bias"].isnan().any()
    assert sent["2.weight"].isfinite().all()


def test_a_loop_and_vmap_over_clients_send_the_same_bits() -> None:
    defense = Censor(trials=6)
    clients, updates = [client(c) for c in range(CLIENTS)], [update(c) for c in range(CLIENTS)]
    noises = [defense.draw(c.params, c.batch, stream(2, n)) for n, c in enumerate(clients)]

    def protect(own: Update, batch: Batch, noise: Noise) -> Update:
        return defense.protect(own, clients[0]._replace(batch=batch), {}, {}, noise)[0]

    together = torch.vmap(protect)(
        {k: torch.stack([u[k] for u in updates]) for k in updates[0]},
        Batch(*(torch.stack(parts) for parts in zip(*(c.batch for c in clients), strict=True))),
        {k: torch.stack([n[k] for n in noises]) for k in noises[0]},
    )
    for n in range(CLIENTS):
        alone = protect(updates[n], clients[n].batch, noises[n])
        assert all(torch.equal(together[k][n], s) for k, s in alone.items())


def test_the_surrogate_of_the_true_update_is_what_was_observed() -> None:
    at, own = client(0), update(0)
    sent, _ = Censor().protect(own, at, {}, {}, Censor().draw(at.params, at.batch, stream(2)))
    stand_in = Censor().surrogate(own, Observation(params=at.params, update=sent))
    assert all(torch.allclose(stand_in[k], s, atol=1e-5) for k, s in sent.items())
    other = Censor().surrogate(update(1), Observation(params=at.params, update=sent))
    assert not torch.allclose(other["0.weight"], sent["0.weight"], atol=1e-2)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"projection": "exact"}, "projection='exact' is not known. Choose one of: corrected, published"),
        ({"trials": 0}, "trials=0 must be a whole number of at least 1"),
        ({"candidates_at_once": 1.5}, "candidates_at_once=1.5 must be a whole number"),
        ({"step": 0}, "step=0 must be finite and above 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_a_sentence(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Censor(**changed)
