"""Learning to invert: what it is trained on is what clients send, and it rebuilds what the update tells."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from attack_problems import Memory, psnr_db
from hydra import compose, initialize_config_dir
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gia_bench.attacks.auxiliary_mean import AuxiliaryMean
from gia_bench.attacks.inverter import assigned_error
from gia_bench.attacks.learned_inverter import LearnedInverter
from gia_bench.attacks.lessons import Material
from gia_bench.attacks.rehearsal import Rehearsal
from gia_bench.attacks.sketch import Sketch
from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.ats import ATS
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.defenses.quantize import SignSGD
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.execution import Loop
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded
from gia_bench.threat import Knowledge
from gia_bench.values import Batch, Observation, Update

SHAPE = (1, 8, 8)
SMALL = LearnedInverter(hidden=16, epochs=4, batch_size=8, num_examples=40, learning_rate=1e-3)


def digits(start: int, count: int) -> InMemory:
    data = load_digits()
    images = torch.tensor(data.images[start : start + count] / 16, dtype=torch.float32)[:, None]
    return InMemory(images, torch.tensor(data.target[start : start + count], dtype=torch.int64))


def linear_victim(norm: bool = False) -> Victim:
    with seeded(0, "linear"):
        middle = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)] if norm else []
        module = nn.Sequential(*middle, nn.Flatten(), nn.Linear(72 if norm else 64, 10))
    return Victim(module=module, input_shape=SHAPE, num_classes=10)


def seen(
    victim: Victim, own: InMemory, batch: int = 1, defense: Defense | None = None, **shown: Any
) -> list[Observation]:
    """The updates of clients who hold ``batch`` of ``own`` each, and no others' examples as public."""
    params, buffers = victim.initial()
    found = []
    for start in range(0, len(own), batch):
        x, y = own.pixels[start : start + batch], own.labels[start : start + batch]
        update = gradient(victim, params, buffers, x, y)
        if defense is not None:
            update = protected(defense, victim, update, x, y)
        found.append(Observation(params=params, buffers=buffers, update=update, num_examples=batch, **shown))
    return found


def gradient(victim: Victim, params: Update, buffers: Update, x: Tensor, y: Tensor) -> Update:
    """By plain autograd, one client at a time."""
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    loss = victim.objective(leaves, buffers, Batch(x, y, torch.ones(len(y))))[0]
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def protected(defense: Defense, victim: Victim, update: Update, x: Tensor, y: Tensor) -> Update:
    params, buffers = victim.initial()
    client = Client(victim, params, buffers, Batch(x[None], y[None], torch.ones(1, len(y))))
    return defense.protect(update, client, defense.init_client(params), {}, {})[0]


def rehearsed(rehearsal: Rehearsal, images: Tensor, labels: Tensor) -> Update:
    parts = list(rehearsal.updates(images, labels, "here"))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def played(victim: Victim, defense: Defense, local: LocalWork, source: InMemory, batch: int) -> list[Update]:
    """What the clients of a real round send, each holding ``batch`` examples of ``source``."""
    clients = tuple(range(len(source) // batch))
    steps = tuple(tuple(batch * c + p for p in local.schedule(batch, 0, 0, c)) for c in clients)
    cohort = Cohort(
        round_index=0, clients=clients, source=source, steps=steps, weights=(batch,) * len(clients)
    )  # fmt: skip
    rules = Rules(victim=victim, defense=defense, local=local, executor=Loop(), seed=0)
    params, buffers = victim.initial()
    with torch.no_grad():
        transcript = play_round(
            rules, Server(params, buffers, defense.init_server(params)), {}, cohort, observed=clients
        ).transcript
    assert transcript is not None
    return [dict(transcript.updates[c]) for c in clients]


def test_on_a_linear_model_it_finds_digits_it_never_saw_far_better_than_their_mean() -> None:
    victim, own, public = linear_victim(), digits(0, 20), digits(500, 600)
    attack = LearnedInverter(hidden=128, epochs=40, batch_size=64, learning_rate=2e-3)
    observations = seen(victim, own, public=public)
    found = torch.cat([r.inputs for r in attack.reconstruct_many(observations, victim, seeds=range(20))])
    mean = torch.cat([r.inputs for r in AuxiliaryMean().reconstruct_many(observations, victim, seeds=range(20))])

    learned, control = psnr_db(found, own.pixels).median(), psnr_db(mean, own.pixels).median()
    assert learned > control + 5


def test_two_digits_in_one_update_are_both_found_better_than_the_mean() -> None:
    victim, own, public = linear_victim(), digits(0, 20), digits(500, 600)
    attack = LearnedInverter(hidden=128, epochs=40, batch_size=64, learning_rate=2e-3)
    observations = seen(victim, own, batch=2, public=public)
    errors = []
    for one in (attack, AuxiliaryMean()):
        found = torch.stack([r.inputs for r in one.reconstruct_many(observations, victim, seeds=range(10))])
        assert found.shape == (10, 2, *SHAPE)
        errors.append(assigned_error(found.flatten(2), own.pixels.view(10, 2, -1)).mean().item())

    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("local", [FedSGD(batch_size=2), FedAvg(learning_rate=0.3, epochs=2, batch_size=2)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("defense", [TopK(), DGP(), SignSGD()], ids=lambda d: type(d).__name__)
def test_the_adaptive_one_learns_from_what_clients_of_a_real_round_would_send(
    local: LocalWork, norm: bool, defense: Defense
) -> None:
    victim, public = linear_victim(norm), digits(0, 6)
    real = played(victim, defense, local, public, 2)
    [first, *_] = seen(victim, public, batch=2, local=local)
    first = dataclasses.replace(first, defense=defense)
    rehearsal = Rehearsal(victim=victim, observation=first, chunk_size=2, seed=0)
    own = rehearsed(rehearsal, public.pixels.view(3, 2, *SHAPE), public.labels.view(3, 2))
    for c, update in enumerate(real):
        for name in update:
            torch.testing.assert_close(own[name][c], update[name], rtol=1e-4, atol=1e-6)
    assert not rehearsal.varies(public.pixels[:2], public.labels[:2])


def test_under_pruning_the_adaptive_one_trains_on_pruned_updates_and_the_oblivious_one_does_not() -> None:
    victim, own, public = linear_victim(), digits(0, 2), digits(500, 100)
    shown = {"public": public, "local": FedSGD(batch_size=1)}
    defense = TopK(keep=0.2)
    features = {}
    for name, known in (("adaptive", defense), ("oblivious", None)):
        [first, _] = seen(victim, own, defense=defense, **shown)
        material = built(dataclasses.replace(first, defense=known), victim)
        features[name] = material.training(0).features
        x = material.training(0).images[0].view(1, *SHAPE)
        [label] = [y for p, y in zip(public.pixels, public.labels, strict=True) if torch.equal(p, x[0])]
        plain = gradient(victim, *victim.initial(), x, label[None])
        naive = protected(defense, victim, plain, x, label[None]) if known else plain
        expected = torch.cat([naive[k].flatten() for k in naive])
        torch.testing.assert_close(features[name][0], expected, rtol=1e-4, atol=1e-6)
    kept = sum(-(-n // 5) for n in (640, 10))
    assert (features["adaptive"] != 0).sum(1).max() <= kept
    assert (features["oblivious"] != 0).sum(1).min() > kept


def built(observation: Observation, victim: Victim, **changed: Any) -> Material:
    settings: dict[str, Any] = {
        "num_examples": None, "holdout": 0.2, "projection": None, "scaled": False, "renew": 1, "chunk_size": 16,
        "seed": 0,
    }  # fmt: skip
    return Material.of(observation, victim, **{**settings, **changed})


@pytest.mark.parametrize("local", [FedSGD(batch_size=3), FedAvg(learning_rate=0.3, epochs=2, batch_size=2)])
@pytest.mark.parametrize("defense", [None, GaussianNoise(variance=1e-2), ATS(), DGP()], ids=lambda d: type(d).__name__)
def test_one_client_at_a_time_and_all_at_once_send_the_same(local: LocalWork, defense: Defense | None) -> None:
    victim, public = linear_victim(), digits(0, 15)
    [first, *_] = seen(victim, public, batch=3, local=local, defense=None)
    first = dataclasses.replace(first, defense=defense)
    images, labels = public.pixels.view(5, 3, *SHAPE), public.labels.view(5, 3)
    loop, mapped = (
        rehearsed(Rehearsal(victim=victim, observation=first, chunk_size=n, seed=7), images, labels) for n in (1, 4)
    )
    for name in loop:
        torch.testing.assert_close(loop[name], mapped[name], rtol=1e-4, atol=1e-6)


def test_the_passes_of_a_rehearsed_client_have_orders_of_their_own() -> None:
    victim, public = linear_victim(), digits(0, 4)
    [first, *_] = seen(victim, public, batch=4, local=FedAvg(learning_rate=1.0, epochs=1, batch_size=2))
    rehearsal = Rehearsal(victim=victim, observation=first, chunk_size=8, seed=0)
    images, labels = public.pixels.expand(6, 4, *SHAPE), public.labels.expand(6, 4)
    updates = rehearsed(rehearsal, images, labels)["1.weight"].flatten(1)
    assert len(updates.unique(dim=0)) > 1
    assert rehearsal.varies(images[0], labels[0])


def test_noise_is_drawn_for_every_client_and_lesson_with_the_defenses_own_variance() -> None:
    victim, public = linear_victim(), digits(0, 64)
    local, defense = FedSGD(batch_size=1), GaussianNoise(variance=1e-2)
    [first, *_] = seen(victim, digits(100, 1), local=local, public=public, defense=None)
    noisy = built(dataclasses.replace(first, defense=defense), victim)
    plain = built(first, victim)
    order = [torch.cdist(m.training(0).images[:, 0], public.pixels.flatten(1)).argmin(1) for m in (plain, noisy)]
    assert torch.equal(*order)
    noise = noisy.training(0).features - plain.training(0).features
    assert noise.var().item() == pytest.approx(1e-2, rel=0.05)
    again = noisy.training(1).features
    assert not torch.equal(again, noisy.training(0).features)
    assert plain.training(1) is plain.training(0)


def test_held_out_examples_are_in_no_lesson_and_every_lesson_is_of_public_examples_alone() -> None:
    victim, own, public = linear_victim(), digits(0, 2), digits(500, 50)
    [first] = seen(victim, own, batch=2, public=public)
    material = built(first, victim)
    pixels = public.pixels.flatten(1)
    held = {int((pixels == x).all(1).nonzero()[0]) for x in material.held_out.images.flatten(0, 1)}
    assert len(held) == 10
    for epoch in range(5):
        lesson = material.training(epoch).images.flatten(0, 1)
        rows = [int((pixels == x).all(1).nonzero()[0]) for x in lesson]
        assert len(set(rows)) == len(rows) == 40
        assert not held & set(rows)
    assert not torch.equal(material.training(0).images, material.training(1).images)


def test_images_are_matched_to_a_batch_in_the_order_that_fits_best() -> None:
    draw = torch.Generator().manual_seed(0)
    found, truth = (torch.rand(5, 3, 10, generator=draw) for _ in range(2))
    naive = [
        min((f[list(p)] - t).square().mean() for p in itertools.permutations(range(3)))
        for f, t in zip(found, truth, strict=True)
    ]
    torch.testing.assert_close(assigned_error(found, truth), torch.stack(naive))
    shuffled = truth[:, torch.tensor([2, 0, 1])]
    torch.testing.assert_close(assigned_error(found, truth), assigned_error(found, shuffled))
    torch.testing.assert_close(assigned_error(truth, shuffled), torch.zeros(5))
    leaf = found.clone().requires_grad_()
    [slope] = torch.autograd.grad(assigned_error(leaf, truth).sum(), leaf)
    step = found - 1e-3 * slope
    assert bool((assigned_error(step, truth) < assigned_error(found, truth)).all())


@pytest.mark.parametrize("projection", [None, 50])
def test_a_killed_training_goes_on_to_the_same_images(projection: int | None) -> None:
    victim, own, public = linear_victim(), digits(0, 4), digits(500, 60)
    attack = dataclasses.replace(SMALL, projection=projection)
    observations = seen(victim, own, batch=2, public=public)
    whole = attack.reconstruct_many(observations, victim, seeds=[0, 1])
    for lives in (1, 3):
        memory = Memory(saves_to_live=lives)
        with pytest.raises(KeyboardInterrupt):
            attack.reconstruct_many(observations, victim, seeds=[0, 1], snapshots=memory)
        [state] = memory.kept.values()
        assert state["epoch"] == lives
        resumed = attack.reconstruct_many(observations, victim, seeds=[0, 1], snapshots=_alive(memory))
        for a, b in zip(whole, resumed, strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert a.score == b.score


def test_victims_of_one_model_are_inverted_by_one_network_and_company_changes_nothing() -> None:
    victim, own, public = linear_victim(), digits(0, 3), digits(500, 60)
    observations = seen(victim, own, public=public)
    # another server's model, and the same one in other tensors
    moved = {k: v + 0.01 for k, v in observations[2].params.items()}
    copied = {k: v.clone() for k, v in observations[1].params.items()}
    observations[1] = dataclasses.replace(observations[1], params=copied)
    observations[2] = dataclasses.replace(observations[2], params=moved)
    memory = Memory()
    found = SMALL.reconstruct_many(observations, victim, seeds=[0, 1, 2], snapshots=memory)
    assert len(memory.kept) == 2
    for o, r in zip(observations, found, strict=True):
        assert torch.equal(SMALL.reconstruct(o, victim, seed=9).inputs, r.inputs)
    other = dataclasses.replace(SMALL, seed=1).reconstruct(observations[0], victim)
    assert not torch.equal(other.inputs, found[0].inputs)


def test_the_score_is_the_error_on_held_out_examples_and_nothing_of_the_victims() -> None:
    victim, own, public = linear_victim(), digits(0, 2), digits(500, 60)
    observations = seen(victim, own, public=public)
    first, second = SMALL.reconstruct_many(observations, victim, seeds=[0, 1])
    assert first.score == second.score
    [o, _] = observations
    material = built(o, victim, num_examples=40, holdout=0.1, scaled=True)
    errors = []
    for x in material.held_out.images[:, 0]:
        place = int((public.pixels.flatten(1) == x).all(1).nonzero()[0])
        update = gradient(victim, *victim.initial(), x.view(1, *SHAPE), public.labels[place : place + 1])
        found = SMALL.reconstruct(dataclasses.replace(o, update=update), victim).inputs
        errors.append((found.flatten() - x).square().mean())
    assert first.score == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_a_sketch_adds_every_entry_once_and_keeps_lengths_in_expectation() -> None:
    draw = torch.Generator().manual_seed(0)
    update = {"a": torch.randn(4, 5, 3, generator=draw), "b": torch.randn(4, 10, generator=draw)}
    flat = torch.cat([v.flatten(1) for v in update.values()], 1)
    assert torch.equal(Sketch.of(update, None, scaled=False, seed=0)(update), flat)
    wide = Sketch.of(update, 25, scaled=False, seed=0)(update)
    torch.testing.assert_close(wide.abs().sort(1).values, flat.abs().sort(1).values)
    sketch = Sketch.of(update, 7, scaled=False, seed=0)
    assert sketch.places is not None and sketch.signs is not None
    naive = torch.zeros(4, 7)
    for bucket in range(7):
        for place, sign in zip(sketch.places[bucket].tolist(), sketch.signs[bucket].tolist(), strict=True):
            naive[:, bucket] += sign * flat[:, place]
    torch.testing.assert_close(sketch(update), naive)
    used = sketch.places[sketch.signs != 0]
    assert used.sort().values.tolist() == list(range(25))
    lengths = torch.stack([Sketch.of(update, 7, scaled=False, seed=s)(update).square().sum(1) for s in range(400)])
    torch.testing.assert_close(lengths.mean(0), flat.square().sum(1), rtol=0.1, atol=0)


def test_tensors_are_brought_to_one_scale_before_they_are_hashed() -> None:
    update = {"loud": 1e3 * torch.ones(2, 8), "quiet": 1e-3 * torch.ones(2, 8), "silent": torch.zeros(2, 8)}
    entries = Sketch.of(update, 24, scaled=True, seed=0)(update).abs()
    assert entries.sort(1).values[0].tolist() == pytest.approx([0.0] * 8 + [1.0] * 16)


def test_the_mean_of_auxiliary_images_is_what_numpy_says() -> None:
    victim, own, public = linear_victim(), digits(0, 4), digits(500, 1500)
    found = AuxiliaryMean().reconstruct_many(seen(victim, own, batch=2, public=public), victim, seeds=[0, 1])
    images = public.pixels.double().numpy()
    for r in found:
        assert r.inputs.shape == (2, *SHAPE)
        torch.testing.assert_close(r.inputs[1].double(), torch.as_tensor(images.mean(0)), rtol=1e-5, atol=1e-6)
        assert r.score == pytest.approx(images.var(0).mean(), rel=1e-6)
        assert r.labels is not None
        assert r.labels.tolist() == [int(public.labels.bincount().argmax())] * 2


def test_what_is_not_shown_or_too_little_is_refused_with_the_way_out() -> None:
    victim, own, public = linear_victim(), digits(0, 2), digits(500, 3)
    [o] = seen(victim, own, batch=2)
    cases = [
        (o, "threat=curious_server_public"),
        (dataclasses.replace(o, public=public), "do not make one update of 2"),
        (dataclasses.replace(o, public=digits(500, 9), num_clients=3), "sees single updates"),
        (dataclasses.replace(o, public=digits(500, 9), defense=TopK()), "add local to threat.knows"),
        (dataclasses.replace(o, public=digits(500, 9), update={}), "nothing to invert"),
    ]
    for observation, sentence in cases:
        with pytest.raises(IncompatibleError, match=sentence):
            SMALL.reconstruct(observation, victim)
    with pytest.raises(IncompatibleError, match="threat=curious_server_public"):
        AuxiliaryMean().reconstruct(o, victim)
    headless = Victim(module=nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), input_shape=SHAPE, num_classes=10)
    with pytest.raises(IncompatibleError, match="labels=known"):
        SMALL.check_victim(headless)
    for field, value in (("holdout", 0.0), ("hidden", 0), ("projection", 0), ("labels", "joint"), ("decay_at", 2.0)):
        with pytest.raises(ConfigError, match=f"attack.{field}={value!r}"):
            LearnedInverter(**{field: value})  # type: ignore[arg-type]
    assert Knowledge.PUBLIC in LearnedInverter().requires


def test_an_update_of_nan_fails_alone_and_the_others_are_rebuilt() -> None:
    victim, own, public = linear_victim(), digits(0, 2), digits(500, 60)
    good, bad = seen(victim, own, public=public)
    bad = dataclasses.replace(bad, update={k: v * torch.nan for k, v in bad.update.items()})
    first, second = SMALL.reconstruct_many([bad, good], victim, seeds=[0, 1])
    assert "NaN or infinity" in (first.failure or "")
    assert first.inputs.isfinite().all()
    assert second.failure is None
    assert torch.equal(second.inputs, SMALL.reconstruct(good, victim).inputs)


def test_an_attacker_who_sees_fewer_tensors_learns_from_those() -> None:
    victim, own, public = linear_victim(), digits(0, 1), digits(500, 60)
    [o] = seen(victim, own, public=public)
    weight = dataclasses.replace(o, update={"1.weight": o.update["1.weight"]})
    found = SMALL.reconstruct(weight, victim)
    assert found.failure is None
    assert not torch.equal(found.inputs, SMALL.reconstruct(o, victim).inputs)


def test_a_resumed_training_never_takes_a_network_of_other_settings() -> None:
    victim, own, public = linear_victim(), digits(0, 1), digits(500, 60)
    [o] = seen(victim, own, public=public, local=FedSGD(batch_size=1))
    memory = Memory()
    SMALL.reconstruct(o, victim)
    for observation, attack in (
        (o, SMALL),
        (o, dataclasses.replace(SMALL, hidden=8)),
        (dataclasses.replace(o, defense=TopK(error_feedback=ErrorFeedback(enabled=False))), SMALL),
        (dataclasses.replace(o, params={k: 2 * v for k, v in o.params.items()}), SMALL),
    ):
        attack.reconstruct_many([observation], victim, seeds=[0], snapshots=memory)
    assert len(memory.kept) == 4


def test_the_network_is_drawn_from_the_runs_seed() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["attack=[learned_inverter]", "seed=7"])
    assert cfg.attack.learned_inverter.seed == 7


def _alive(dead: Memory) -> Memory:
    memory = Memory()
    memory.kept = dict(dead.kept)
    return memory
