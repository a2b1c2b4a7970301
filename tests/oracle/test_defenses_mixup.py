"""MixUp and InstaHide: their laws, naive loops, what later stages make of mixed labels, and real rounds."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gia_bench.data.cohort import Cohort
from gia_bench.data.datamodule import FederatedDataModule
from gia_bench.data.partition import Partition
from gia_bench.data.source import Dataset, InMemory
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.ats import ATS
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.mixup import InstaHide, MixUp, cycle
from gia_bench.defenses.soteria import Soteria
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim, binary_cross_entropy
from gia_bench.pruning.pruned import Pruned
from gia_bench.pruning.random_mask import RandomMask
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Examples

CLASSES, SIZE = 4, 5
NOTHING: Examples = InMemory(torch.zeros(0, 3, SIZE, SIZE), torch.zeros(0, dtype=torch.int64))


def victim(normalised: bool = True) -> Victim:
    with seeded(0, "model"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 6), nn.Sigmoid(), nn.Linear(6, CLASSES))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.5, 1.5])
    if not normalised:
        return Victim(module=module, input_shape=(3, SIZE, SIZE), num_classes=CLASSES)
    return Victim(module=module, input_shape=(3, SIZE, SIZE), num_classes=CLASSES, mean=mean, std=std)


def batch(*shape: int, seed: int = 0) -> Batch:
    g = stream(seed, "images")
    pixels = torch.rand(*shape, 3, SIZE, SIZE, generator=g)
    return Batch(pixels, torch.randint(CLASSES, shape, generator=g), torch.ones(shape))


def made(defense: Defense, model: Victim | None = None) -> Defense:
    return defense.calibrate(model or victim(), NOTHING)


MIXUP = MixUp(klam=4, upper_bound=0.65, lower_bound=0.02)
BOTH = [MIXUP, InstaHide(mixing=MIXUP)]


def test_the_transform_is_a_naive_sum_over_distinct_images_of_the_same_step() -> None:
    defense, images = made(MIXUP), batch(2, 7)
    noise = defense.draw({}, images, stream(1))
    mixed = defense.transform(images, noise)
    for s in range(2):
        for b in range(7):
            partners, shares = noise["partners"][s, b].tolist(), noise["coefficients"][s, b].tolist()
            assert partners[0] == b and len(set(partners)) == 4
            pixels = sum(c * images.inputs[s, p] for c, p in zip(shares, partners, strict=True))
            labels = torch.zeros(CLASSES)
            for c, p in zip(shares, partners, strict=True):
                labels[images.labels[s, p]] += c
            torch.testing.assert_close(mixed.inputs[s, b], pixels)
            torch.testing.assert_close(mixed.labels[s, b], labels)


def test_coefficients_sum_to_one_keep_their_bounds_and_differ_from_image_to_image() -> None:
    shares = MIXUP.draw({}, batch(5, 40), stream(0))["coefficients"]
    torch.testing.assert_close(shares.sum(-1), torch.ones(5, 40))
    assert shares.max() <= 0.65 and shares.min() >= 0.02
    assert len(shares.view(-1, 4).unique(dim=0)) == 200


def test_unbounded_coefficients_are_dirichlets() -> None:
    shares = MixUp(klam=4, concentration=3.0).draw({}, batch(1, 20_000), stream(0))["coefficients"][0]
    a = torch.tensor([3.0, 1, 1, 1])
    torch.testing.assert_close(shares.mean(0), a / 6, atol=0.005, rtol=0)
    torch.testing.assert_close(shares.var(0), a * (6 - a) / 36 / 7, atol=0.002, rtol=0)


def test_every_image_enters_as_many_mixtures_as_there_are_partners_and_all_others_equally_often() -> None:
    g, counts = stream(0), torch.zeros(6, 6)
    for _ in range(600):
        rows = cycle(6, 3, g)
        assert rows[:, 0].tolist() == list(range(6)) and rows.flatten().bincount().tolist() == [3] * 6
        for others in rows[:, 1:].T:
            counts[torch.arange(6), others] += 1
    apart = counts[~torch.eye(6, dtype=torch.bool)] / 600
    torch.testing.assert_close(apart, torch.full_like(apart, 0.4), atol=0.1, rtol=0)


@pytest.mark.parametrize("defense", BOTH, ids=["mixup", "instahide"])
def test_padding_stays_as_it_is_and_enters_no_mixture(defense: Defense) -> None:
    images = batch(3, 6)
    images.mask[1, 3:], images.mask[2] = 0, 0
    images.inputs[images.mask == 0] = torch.nan
    noise = made(defense).draw({}, images, stream(0))
    mixed = made(defense).transform(images._replace(inputs=images.inputs.nan_to_num(1e6)), noise)
    assert (mixed.inputs[images.mask == 0] == 1e6).all()
    assert mixed.inputs[images.mask == 1].abs().max() < 3
    torch.testing.assert_close(mixed.labels.sum(-1), torch.ones(3, 6))
    assert torch.equal(mixed.mask, images.mask)


@pytest.mark.parametrize("defense", BOTH, ids=["mixup", "instahide"])
def test_loop_and_vmap_give_the_same_bits_and_more_padding_changes_no_number(defense: Defense) -> None:
    bound, clients = made(defense), batch(3, 2, 5)
    clients.mask[1, 1, 2:] = 0
    each = [Batch(*(t[c] for t in clients)) for c in range(3)]
    noises = [bound.draw({}, b, stream(0, c)) for c, b in enumerate(each)]
    mapped = torch.vmap(bound.transform)(clients, {k: torch.stack([n[k] for n in noises]) for k in noises[0]})
    for c, alone in enumerate(map(bound.transform, each, noises)):
        assert torch.equal(alone.inputs, mapped.inputs[c]) and torch.equal(alone.labels, mapped.labels[c])
    wide = Batch(*(torch.cat([t, torch.zeros_like(t)], 1) for t in each[1]))
    wide = Batch(*(torch.cat([t, torch.zeros_like(t)], 0) for t in wide))
    padded = bound.transform(wide, bound.draw({}, wide, stream(0, 1)))
    real = each[1].mask > 0
    assert torch.equal(padded.inputs[:2, :5][real], mapped.inputs[1][real])


def test_one_image_alone_is_the_identity_for_mixup() -> None:
    images = batch(2, 3)
    defense = made(MixUp(klam=1))
    mixed = defense.transform(images, defense.draw({}, images, stream(0)))
    assert torch.equal(mixed.inputs, images.inputs)
    assert torch.equal(mixed.labels, nn.functional.one_hot(images.labels, CLASSES).float())


@pytest.mark.parametrize("normalised", [True, False])
def test_instahide_keeps_the_magnitudes_of_the_normalised_mixture_and_flips_about_half(normalised: bool) -> None:
    model, images = victim(normalised), batch(1, 50)
    defense = made(InstaHide(mixing=MIXUP), model)
    noise = defense.draw({}, images, stream(0))
    hidden, plain = defense.transform(images, noise), made(MIXUP).transform(images, noise)

    def seen(x: Tensor) -> Tensor:
        if model.mean is None or model.std is None:
            return x
        return (x - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1)

    torch.testing.assert_close(seen(hidden.inputs), noise["signs"] * seen(plain.inputs), rtol=1e-4, atol=2e-6)
    assert 0.48 < (noise["signs"] > 0).float().mean() < 0.52
    assert not torch.equal(noise["signs"][0, 0], noise["signs"][0, 1])
    assert not torch.equal(noise["signs"][0, 0, 0], noise["signs"][0, 0, 1])
    assert torch.equal(hidden.labels, plain.labels)


def test_a_center_of_ones_own_is_what_pixels_are_turned_around() -> None:
    images = batch(1, 3)
    defense = made(InstaHide(mixing=MixUp(klam=1), center=[0.5]))
    noise = defense.draw({}, images, stream(0))
    wanted = torch.where(noise["signs"] > 0, images.inputs, 1 - images.inputs)
    torch.testing.assert_close(defense.transform(images, noise).inputs, wanted)


def test_a_step_with_fewer_examples_mixes_all_it_has_and_one_alone_is_refused() -> None:
    noise = MIXUP.draw({}, batch(1, 3), stream(0))
    assert noise["coefficients"][0, :, 3].eq(0).all() and noise["coefficients"][0, :, :3].min() >= 0.02
    for defense in (MIXUP, MixUp(klam=2)):
        with pytest.raises(IncompatibleError, match="1 example"):
            defense.draw({}, batch(1, 1), stream(0))
    with pytest.raises(IncompatibleError, match="2 example"):
        MixUp(klam=4, upper_bound=0.3).draw({}, batch(1, 2), stream(0))


@pytest.mark.parametrize(
    "defense",
    [*BOTH, Chain(stages={"clip": ClipUpdate(), "mix": MIXUP}), Pruned(inner=MIXUP, method=RandomMask(density=0.5))],
    ids=["mixup", "instahide", "chain", "pruned"],
)
def test_step_sizes_are_refused_as_soon_as_they_are_known_however_deep_the_mixing_is(defense: Defense) -> None:
    defense.check_steps({2, 4, 8})
    with pytest.raises(IncompatibleError, match=r"1 example\(s\).*at least 2.*fl\.local\.batch_size.*klam=1"):
        defense.check_steps({8, 1})


def test_what_is_refused_of_a_step_size_is_what_a_draw_refuses() -> None:
    for defense, size in itertools.product([MIXUP, MixUp(klam=1), MixUp(upper_bound=0.3), MixUp(klam=2)], range(1, 6)):
        refused = []
        for ask in (partial(defense.check_steps, {size}), partial(defense.draw, {}, batch(1, size), stream(0))):
            try:
                ask()
            except IncompatibleError as error:
                refused.append(str(error))
        assert len(refused) in (0, 2) and len(set(refused)) <= 1, (defense, size)
    with pytest.raises(ConfigError, match="1000 draws"):
        MixUp(klam=8, upper_bound=0.126, lower_bound=0.124).check_steps({8})


def test_the_step_sizes_of_a_federation_are_those_of_its_cohorts() -> None:
    labels = torch.arange(20) % CLASSES
    whole = InMemory(torch.zeros(20, 1, SIZE, SIZE), labels)
    dataset = Dataset(
        name="some", train=whole, test=whole, num_classes=CLASSES, shape=whole.shape, mean=(0.0,), std=(1.0,),
        version="",
    )  # fmt: skip
    partition = Partition(tuple(torch.arange(20).split([9, 5, 6])))
    for local in (SGD, AVG, FedSGD(batch_size=None), dataclasses.replace(AVG, epochs=None, steps=1)):
        data = FederatedDataModule(dataset=dataset, partition=partition, local=local, clients_per_round=None, seed=0)
        for round_index in range(5):
            counts = data.cohort(round_index).counts
            assert data.step_sizes == {n for of_client in counts for n in of_client}


@pytest.mark.parametrize(
    ("name", "value"),
    [("klam", 0), ("klam", 2.5), ("concentration", 0), ("upper_bound", 0.2), ("upper_bound", 1.1),
     ("lower_bound", 0.3), ("lower_bound", -0.1), ("num_classes", 0)],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(MixUp(), **{name: value})


def test_what_cannot_be_mixed_is_said() -> None:
    with pytest.raises(ConfigError, match="1000 draws"):
        MixUp(klam=8, upper_bound=0.126, lower_bound=0.124).draw({}, batch(1, 8), stream(0))
    with pytest.raises(IncompatibleError, match="num_classes"):
        MixUp(num_classes=3).check_victim(victim())
    with pytest.raises(IncompatibleError, match="center"):
        InstaHide(mixing=MixUp(), center=[0.5, 0.5]).check_victim(victim())
    for defense in (MixUp(), InstaHide(mixing=MixUp())):
        with pytest.raises(ConfigError, match="calibrate"):
            defense.transform(batch(1, 4), defense.draw({}, batch(1, 4), stream(0)))


def play(defense: Defense, local: LocalWork, executor: Executor, model: Victim | None = None) -> Round:
    """One round of three clients with 8, 4 and 6 examples, batches of 4: padded steps of 2 examples, and none."""
    model = model or victim()
    g, sizes = stream(0, "data"), [8, 4, 6]
    source = InMemory(torch.rand(18, 3, SIZE, SIZE, generator=g), torch.randint(CLASSES, (18,), generator=g))
    owned = torch.arange(18).split(sizes)
    steps = tuple(tuple(owned[c][i] for i in local.schedule(n, 0, 0, c)) for c, n in enumerate(sizes))
    cohort = Cohort(round_index=0, clients=(0, 1, 2), steps=steps, weights=(1, 1, 1), source=source)
    rules = Rules(
        victim=model, defense=defense.calibrate(model, NOTHING), local=local, executor=executor, seed=0,
        weighting="examples", on_nonfinite="fail",
    )  # fmt: skip
    params, buffers = model.initial()
    return play_round(rules, Server(params, buffers, {}), {}, cohort, observed=(0, 1, 2))


SGD, AVG = FedSGD(batch_size=4), FedAvg(learning_rate=0.1, epochs=2, batch_size=4)


@pytest.mark.parametrize("local", [SGD, AVG], ids=["fedsgd", "fedavg"])
@pytest.mark.parametrize(
    "defense",
    [*BOTH, Chain(stages={"mix": MIXUP, "dp": DPSGD()}), Chain(stages={"mix": MIXUP, "soteria": Soteria()}),
     Chain(stages={"mix": MIXUP, "hide": InstaHide(mixing=MIXUP)})],
    ids=["mixup", "instahide", "dp_sgd", "soteria", "twice"],
)  # fmt: skip
def test_mixed_labels_flow_through_rounds_equally_in_a_loop_and_mapped(defense: Defense, local: LocalWork) -> None:
    alone, mapped = (play(defense, local, e) for e in (Loop(), Vmap(chunk_size=3)))
    assert alone.transcript and mapped.transcript
    for client in range(3):
        for name, sent in alone.transcript.updates[client].items():
            torch.testing.assert_close(sent, mapped.transcript.updates[client][name], rtol=1e-4, atol=1e-6)
    assert any(v.abs().sum() > 0 for v in alone.aggregate.values())


@pytest.mark.parametrize("bce", [False, True])
def test_the_update_is_the_gradient_of_the_mixed_examples_under_soft_labels(bce: bool) -> None:
    model = victim()
    model = dataclasses.replace(model, loss=binary_cross_entropy) if bce else model
    defense, images = made(MIXUP), batch(1, 4)
    mixed = defense.transform(images, defense.draw({}, images, stream(0)))
    params, buffers = model.initial()
    one = Batch(*(t[0] for t in mixed))
    got, _, _ = defense.gradient(lambda p, b: model.objective(p, buffers, b), params, one, {}, 0)
    assert model.mean is not None and model.std is not None
    logits = model.module((one.inputs - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1))
    soft = -(one.labels * logits.log_softmax(-1)).sum(-1)
    both = -(one.labels * logits.sigmoid().log() + (1 - one.labels) * (-logits).sigmoid().log()).mean(-1)
    wanted = torch.autograd.grad((both if bce else soft).mean(), list(model.module.parameters()))
    for name, by_hand in zip(got, wanted, strict=True):
        torch.testing.assert_close(got[name], by_hand, rtol=1e-4, atol=1e-6)


def test_protection_sends_the_update_of_the_mixtures_untouched() -> None:
    model = victim()
    params, buffers = model.initial()
    client = Client(model, params, buffers, batch(1, 4))
    for defense in BOTH:
        sent, state = defense.protect(params, client, {}, {}, {})
        assert sent is params and state == {}


def test_examples_can_be_changed_under_an_announced_mask() -> None:
    adgp = ADGP(k1=0.05, k2=0.75, scope="tensor", leader="first", error_feedback=ErrorFeedback())
    plain = play(adgp, SGD, Loop())
    for stage in (*BOTH, ATS()):
        chained = play(Chain(stages={"mask": adgp, "change": stage}), SGD, Vmap(chunk_size=2))
        assert chained.uplink_bytes == plain.uplink_bytes
