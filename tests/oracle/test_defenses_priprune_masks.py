"""PriPrune's masks against numpy and naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gia_bench.defenses.base import Client
from gia_bench.defenses.priprune import PriPrune
from gia_bench.defenses.priprune_masks import GUMBEL, LIMIT, LOGITS, Choice, FixedRate, LearnedRates, most_sensitive
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Update

UPDATE = {"a": torch.tensor([[0.0, -5.0, 1.0], [2.0, 0.0, -2.0]]), "b": torch.tensor([3.0, 0.0, -4.0, 0.5])}


def naive(entries: list[float], rate: float) -> list[bool]:
    """The floor(rate c) largest magnitudes of the c that are not zero; the first of equal ones."""
    count = math.floor(round(rate * sum(e != 0 for e in entries), 9))
    order = sorted(range(len(entries)), key=lambda i: (-abs(entries[i]), i))
    return [i in order[:count] for i in range(len(entries))]


@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_most_sensitive_are_those_of_a_naive_loop_ties_and_zeros_included(size: int, zeros: float) -> None:
    g, rates = stream(size), [0.0, 0.1, 0.3, 0.3 + 0.4, 0.99]
    entries = torch.randint(-4, 5, (5, size), generator=g) * (torch.rand(5, size, generator=g) >= zeros).float()
    mapped = torch.vmap(lambda row: torch.stack(most_sensitive(row, rates)))(entries)
    for row, masks in zip(entries, mapped, strict=True):
        for rate, mask, alone in zip(rates, masks, most_sensitive(row, rates), strict=True):
            assert mask.tolist() == alone.tolist() == naive(row.tolist(), rate)


def sent(defense: PriPrune, update: Update) -> Update:
    params = {k: torch.zeros_like(u) for k, u in update.items()}
    batch = Batch(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    client = Client(None, params, {}, batch)  # type: ignore[arg-type]
    return defense.protect(update, client, defense.init_client(params), {}, {})[0]


def test_the_fixed_rate_by_hand() -> None:
    # seven entries are not zero: floor(0.3 * 7) = 2, of all -5 and -4; of a's four 1, of b's three 0
    got = sent(PriPrune(mask=FixedRate(rate=0.3)), UPDATE)
    assert got["a"].tolist() == [[0, 0, 1], [2, 0, -2]] and got["b"].tolist() == [3, 0, 0, 0.5]
    got = sent(PriPrune(mask=FixedRate(rate=0.3, scope="tensor")), UPDATE)
    assert got["a"].tolist() == [[0, 0, 1], [2, 0, -2]] and got["b"].tolist() == UPDATE["b"].tolist()


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5])
def test_without_zeros_the_fixed_rate_is_the_global_percentile_of_the_public_implementation(rate: float) -> None:
    g = stream(1)
    update = {"w": torch.randn(40, 10, generator=g), "b": torch.randn(101, generator=g)}
    magnitudes = np.abs(np.concatenate([update["w"].numpy().ravel(), update["b"].numpy()]))
    threshold = np.percentile(magnitudes, 100 * (1 - rate))
    for k, v in sent(PriPrune(mask=FixedRate(rate=rate)), update).items():
        expected = np.where(np.abs(update[k].numpy()) <= threshold, update[k].numpy(), 0)
        # where the percentile falls between two entries, floor(rate n) leaves the lower of them its place or not
        assert int((v.numpy() != expected).sum()) <= 1


def test_the_sensitivity_can_be_the_gradient_and_then_not_the_update_chooses() -> None:
    with seeded(0, "model"):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    g, victim = stream(2), Victim(module=model, input_shape=(1, 2, 2), num_classes=3)
    params, buffers = victim.initial()
    batch = Batch(torch.rand(2, 5, 1, 2, 2, generator=g), torch.randint(3, (2, 5), generator=g), torch.ones(2, 5))
    update = {k: torch.randn(p.shape, generator=g) for k, p in params.items()}
    defense = PriPrune(mask=FixedRate(rate=0.4), sensitivity="gradient")
    got, _ = defense.protect(update, Client(victim, params, buffers, batch), defense.init_client(params), {}, {})
    torch.nn.functional.cross_entropy(model(batch.inputs[0]), batch.labels[0]).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    largest = set(gradients.abs().argsort(descending=True)[: int(0.4 * 15)].tolist())
    assert {i for i, v in enumerate(torch.cat([v.flatten() for v in got.values()]).tolist()) if v == 0} == largest


def test_the_learned_rates_are_those_of_finite_differences_of_the_three_losses_written_out() -> None:
    mask = LearnedRates(
        rates=[0.0, 0.25, 0.5], steps=4, learning_rate=0.5, lambda_acc=1.0, lambda_pri=0.7, lambda_sha=2.0
    )
    g = stream(5)
    sizes = {"u": 8, "v": 12, "w": 4}
    sensitivity = {k: torch.rand(n, generator=g).double() + 0.1 for k, n in sizes.items()}
    cost = {k: torch.randn(n, generator=g).double() for k, n in sizes.items()}
    noise = {GUMBEL: mask.draw(sensitivity, stream(6))[GUMBEL].double()}

    def loss(shares: Update) -> Tensor:
        return torch.stack([(cost[k] * s).sum() for k, s in shares.items()]).sum().square() / 10

    def naively(logits: np.ndarray, step: int) -> float:
        temperature = 5.0 * (0.5 / 5.0) ** (step / 3)
        total, private, expected = 0.0, 0.0, []
        for row, noisy, (k, s) in zip(logits, noise[GUMBEL][step].numpy(), sensitivity.items(), strict=True):
            y = np.exp((row + noisy) / temperature)
            y = y / y.sum()
            shares = [
                sum(y[r] * (not naive(s.tolist(), rate)[i]) for r, rate in enumerate(mask.rates)) for i in range(len(s))
            ]
            total += float(np.dot(cost[k].numpy(), shares))
            private += float(np.dot(s.numpy(), shares) / s.sum()) / len(sizes)
            expected.append(float(np.dot(y, mask.rates)))
        apart = ((expected[1] - expected[0]) ** 2 + (expected[2] - expected[1]) ** 2) / 2
        return total**2 / 10 + 0.7 * private + 2.0 * apart

    logits = np.zeros((3, 3))
    for step in range(4):
        slope = np.zeros((3, 3))
        for place in np.ndindex(3, 3):
            shift = np.zeros((3, 3))
            shift[place] = 1e-5
            slope[place] = naively(logits + shift, step) - naively(logits - shift, step)
        logits = np.clip(logits - 0.5 * np.sign(slope), -LIMIT, LIMIT)

    start = {LOGITS: torch.zeros(3, 3, dtype=torch.float64)}
    got, state = mask.withheld(Choice(sensitivity, loss), start, noise)
    assert state[LOGITS].tolist() == logits.tolist()
    for k, best in zip(sizes, logits.argmax(1), strict=True):
        assert got[k].tolist() == naive(sensitivity[k].tolist(), mask.rates[best])


def test_the_noise_is_gumbels() -> None:
    drawn = LearnedRates(steps=2000).draw({"a": torch.zeros(1), "b": torch.zeros(1)}, stream(0))[GUMBEL]
    assert drawn.shape == (2000, 2, 6) and drawn.isfinite().all()
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert drawn.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.03)


def test_a_client_who_has_lost_his_loss_shows_it_in_his_logits() -> None:
    """The sign of NaN is 0: his rates would stay at their first, which withholds nothing."""
    mask, sensitivity = LearnedRates(steps=2), {"a": torch.rand(5, generator=torch.Generator().manual_seed(0))}
    noise = mask.draw(sensitivity, torch.Generator().manual_seed(0))
    choice = Choice(sensitivity, lambda sent: torch.nan * sent["a"].sum())
    _, state = mask.withheld(choice, mask.initial(sensitivity), noise)
    assert state[LOGITS].isnan().all()
