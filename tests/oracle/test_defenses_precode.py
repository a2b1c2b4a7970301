"""PRECODE against plain autograd with the same noise, and what a round, a chain and an attacker make of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from attack_problems import psnr_db, sigmoid_net
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.labels import METHODS
from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.precode import PRECODE
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Observation, Params, Update

SIZES = (5, 3, 5, 4)
SMALL = PRECODE(latent_size=6, beta=0.3)
ENCODER, DECODER, HEAD = "4.bottleneck.encoder", "4.bottleneck.decoder", "4.head"


def victim(*, batch_norm: bool = False, defense: Defense = SMALL) -> Victim:
    with seeded(0, "test model"):
        middle = nn.BatchNorm2d(3) if batch_norm else nn.Identity()
        plain = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), middle, nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)).double()
        return Victim(module=defense.prepare_model(plain), input_shape=(1, 8, 8), num_classes=4)


def batch_of(examples: int, seed: int = 0) -> Batch:
    g = stream(seed, "images")
    images = torch.rand(examples, 1, 8, 8, generator=g, dtype=torch.float64)
    return Batch(images, torch.randint(4, (examples,), generator=g), torch.ones(examples, dtype=torch.float64))


def drawn(params: Params, batch: Batch, defense: Defense = SMALL, seed: int = 0) -> dict[str, Tensor]:
    return defense.draw(params, Batch(*(t[None] for t in batch)), stream(seed, "noise"))


def client_gradient(model: Victim, batch: Batch, noise: dict[str, Tensor], defense: Defense = SMALL) -> Update:
    params, buffers = model.initial()
    alone = Batch(*(t[None] for t in batch))
    result = FedSGD(batch_size=None).run(model, defense, params, buffers, alone, noise, None)
    assert {k: b.shape for k, b in result.buffers.items()} == {k: b.shape for k, b in buffers.items()}
    return result.update


def by_hand(params: Params, batch: Batch, eps: Tensor, beta: float) -> Update:
    """The loss written out with torch's distributions, one example after another, and one plain backward pass."""
    own = {k: p.clone().requires_grad_() for k, p in params.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return own[f"{name}.weight"] @ x + own[f"{name}.bias"]

    losses = []
    for image, label, noise in zip(batch.inputs, batch.labels, eps, strict=True):
        r = torch.tanh(nn.functional.conv2d(image[None], own["0.weight"], own["0.bias"], stride=2)).flatten()
        code = linear(r, ENCODER)
        K = len(code) // 2
        normal = torch.distributions.Normal(code[:K], (1 + code[K:].exp()).log())
        sample = normal.loc + normal.scale * noise
        scores = linear(linear(sample, DECODER), HEAD)
        one = torch.ones_like(normal.loc)
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0 * one, one)).sum()
        losses.append(torch.logsumexp(scores, 0) - scores[label] + beta * kl / math.log(2))
    torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
    return {k: p.grad for k, p in own.items() if p.grad is not None}


def test_a_clients_gradient_is_that_of_the_loss_written_out_by_hand() -> None:
    model, batch = victim(), batch_of(5)
    params, _ = model.initial()
    noise = drawn(params, batch)
    expected = by_hand(params, batch, noise["0.noise"].double(), 0.3)
    assert expected.keys() == params.keys()
    torch.testing.assert_close(client_gradient(model, batch, noise), expected, rtol=1e-9, atol=1e-12)


def test_evaluation_uses_the_mean_whatever_was_drawn_before() -> None:
    model, batch = victim(), batch_of(3)
    params, buffers = model.initial()
    first, _ = model.logits(params, buffers, batch.inputs, training=False)
    client_gradient(model, batch, drawn(params, batch))
    again, _ = model.logits(params, buffers, batch.inputs, training=False)
    assert torch.equal(first, again)
    features = model.module[:4](batch.inputs)  # type: ignore[index]
    mu = (features @ params[f"{ENCODER}.weight"].T + params[f"{ENCODER}.bias"])[:, :6]
    decoded = mu @ params[f"{DECODER}.weight"].T + params[f"{DECODER}.bias"]
    torch.testing.assert_close(first, decoded @ params[f"{HEAD}.weight"].T + params[f"{HEAD}.bias"])


def test_every_example_and_every_step_has_standard_normal_noise_of_its_own() -> None:
    defense = PRECODE(latent_size=500)
    batch = Batch(torch.zeros(3, 20, 1, 8, 8), torch.zeros(3, 20), torch.ones(3, 20))
    noise = defense.draw({}, batch, stream(0))
    assert {k: v.shape for k, v in noise.items()} == {f"{s}.noise": (20, 500) for s in range(3)}
    rows = torch.cat([*noise.values()])
    assert float(rows.mean()) == pytest.approx(0, abs=0.02) and float(rows.std()) == pytest.approx(1, rel=0.02)
    apart = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(apart.abs().max()) < 0.3
    again = defense.draw({}, batch, stream(0))
    assert all(torch.equal(again[k], v) for k, v in noise.items())


@dataclasses.dataclass(frozen=True)
class Double:
    """The same images in float64: no rounding turns an entry's rank around."""

    source: InMemory
    groups = None

    @property
    def labels(self) -> Tensor:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def images(self, indices: Tensor) -> Tensor:
        return self.source.images(indices).double()


def test_padding_after_an_example_or_a_step_does_not_change_their_noise() -> None:
    short, long = (
        PRECODE(latent_size=9).draw({}, Batch(torch.zeros(S, B), torch.zeros(S, B), torch.ones(S, B)), stream(0))
        for S, B in ((2, 3), (4, 8))
    )
    assert all(torch.equal(long[k][:3], v) for k, v in short.items())


def played(model: Victim, defense: Defense, local: LocalWork, executor: Executor) -> Round:
    g = stream(0, "test images")
    total = sum(SIZES)
    source = InMemory(torch.rand(total, 1, 8, 8, generator=g), torch.randint(4, (total,), generator=g))
    chosen = [local.schedule(n, 0, 0, c) for c, n in enumerate(SIZES)]
    owned = torch.arange(total).split(list(SIZES))
    cohort = Cohort(
        round_index=0,
        clients=tuple(range(len(SIZES))),
        steps=tuple(tuple(own[p] for p in steps) for own, steps in zip(owned, chosen, strict=True)),
        weights=SIZES,
        source=Double(source),
    )
    rules = Rules(victim=model, defense=defense, local=local, executor=executor, seed=0)
    return play_round(rules, Server(*model.initial(), {}), {}, cohort, observed=(0, 1))


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize(
    "local", [FedSGD(batch_size=None), FedAvg(learning_rate=0.1, epochs=2, batch_size=2)], ids=["fedsgd", "fedavg"]
)
@pytest.mark.parametrize("defense", [SMALL, Chain(stages={"a": SMALL, "b": TopK(keep=0.9)})], ids=["alone", "chained"])
def test_a_loop_and_vmap_play_the_same_round_and_the_noise_stays_at_home(
    defense: Defense, local: LocalWork, batch_norm: bool
) -> None:
    model = victim(batch_norm=batch_norm)
    loop, mapped = (played(model, defense, local, e) for e in (Loop(), Vmap(chunk_size=3)))
    at_rest = played(model, NoDefense(), local, Loop())
    assert loop.transcript is not None and mapped.transcript is not None and at_rest.transcript is not None
    for client in (0, 1):
        one, many, plain = (r.transcript.updates[client] for r in (loop, mapped, at_rest))  # type: ignore[union-attr]
        torch.testing.assert_close(many, one, rtol=1e-8, atol=1e-10)
        assert not torch.allclose(one["0.weight"], plain["0.weight"], rtol=1e-2)
        sent = loop.transcript.sent_buffers[client]
        assert sent["4.bottleneck.noise"].shape == loop.buffers["4.bottleneck.noise"].shape == (0,)
    torch.testing.assert_close(mapped.aggregate, loop.aggregate, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(mapped.buffers, loop.buffers)
    assert loop.loss == pytest.approx(mapped.loss, rel=1e-5)


def test_padding_contributes_nothing_whatever_it_holds() -> None:
    model, batch = victim(), batch_of(5)
    params, _ = model.initial()
    noise = drawn(params, batch)
    padded = batch._replace(mask=torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64))
    cut = Batch(*(t[:3] for t in batch))
    torch.testing.assert_close(client_gradient(model, padded, noise), client_gradient(model, cut, noise))


def test_a_chain_keeps_the_noise_and_refuses_a_second_way_to_compute_the_gradient() -> None:
    chain = Chain(stages={"first": TopK(keep=1.0), "second": SMALL})
    model, batch = victim(defense=chain), batch_of(3)
    chain.check_victim(model)
    noise = drawn(model.initial()[0], batch, chain)
    chained = client_gradient(model, batch, noise, chain)
    alone = client_gradient(model, batch, {"0.noise": noise["1.0.noise"]})
    assert all(torch.equal(chained[k], g) for k, g in alone.items())
    with pytest.raises(ConfigError, match="a and b both compute the gradient"):
        Chain(stages={"a": SMALL, "b": DPSGD()})
    Chain(stages={"a": ADGP(), "b": SMALL})  # it sends zeros where it is given zeros


def test_the_attackers_dummy_update_is_a_clients_without_noise_penalty_included() -> None:
    model, batch = victim(), batch_of(2)
    params, buffers = model.initial()
    silent = {"0.noise": torch.zeros(2, 6)}
    expected = client_gradient(model, batch, silent)
    dummy = torch.func.grad(lambda p: model.objective(p, buffers, batch)[0])(params)
    torch.testing.assert_close(dummy, expected)
    torch.testing.assert_close(dummy, by_hand(params, batch, torch.zeros(2, 6).double(), 0.3))
    bare = by_hand(params, batch, torch.zeros(2, 6).double(), 0.0)
    assert not torch.allclose(dummy["0.weight"], bare["0.weight"], rtol=1e-2)


def test_dlg_sees_a_small_image_without_the_noise_and_loses_it_with_the_noise() -> None:
    found = {}
    for noisy in (False, True):
        with seeded(2, "model"):
            net = sigmoid_net((1, 8, 8), 4)
            model = Victim(module=SMALL.prepare_model(net).double(), input_shape=(1, 8, 8), num_classes=4)
            for p in model.module.parameters():
                nn.init.uniform_(p, -0.5, 0.5)
        coarse = torch.rand(1, 1, 2, 2, generator=stream(0), dtype=torch.float64)
        smooth = nn.functional.interpolate(coarse, (8, 8), mode="bilinear")
        batch = Batch(smooth, torch.tensor([2]), torch.ones(1, dtype=torch.float64))
        params, buffers = model.initial()
        noise = drawn(params, batch) if noisy else {"0.noise": torch.zeros(1, 6)}
        update = client_gradient(model, batch, noise)
        seen = Observation(params=params, buffers=buffers, update=update, num_examples=1)
        label = METHODS["bias_gradient"](seen, model)
        assert label is not None and label.tolist() == [2]
        attack = dataclasses.replace(dlg(), steps=40, labels="bias_gradient")
        result = attack.reconstruct(seen, model, seed=1)
        assert result.failure is None
        found[noisy] = float(psnr_db(result.inputs[0], batch.inputs[0]))
    assert found[False] > 30
    assert found[True] < 15


def test_a_head_that_does_not_give_the_scores_is_refused() -> None:
    model = victim()
    PRECODE().check_victim(model)
    for wrong in (dataclasses.replace(model, num_classes=5), victim(defense=NoDefense())):
        with pytest.raises(IncompatibleError, match="one output per class"):
            PRECODE().check_victim(wrong)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"latent_size": 0}, "latent_size=0 must be a whole number of at least 1"),
        ({"latent_size": 2.5}, "latent_size=2.5 must be a whole number"),
        ({"latent_size": math.inf}, "latent_size=inf must be a whole number"),
        ({"beta": -1e-3}, "beta=-0.001 must be finite and at least 0"),
        ({"beta": math.nan}, "beta=nan must be finite"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_a_sentence(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PRECODE(**changed)


def test_the_file_has_the_papers_settings() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = instantiate(compose(overrides=["+defense=precode"]).defense)
    assert made == PRECODE(latent_size=256, beta=1e-3) == PRECODE()
