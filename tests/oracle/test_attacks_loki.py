"""LOKI: every client's images come back from the sum, exactly, after one gradient and after a local epoch of FedAvg."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor

from gia_bench.attacks.base import Broadcast
from gia_bench.attacks.loki import Loki
from gia_bench.attacks.robbing import RobbingTheFed
from gia_bench.conf_path import CONF
from gia_bench.data.cifar import cifar10
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory, Source
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.aggregation import Aggregation, Plain
from gia_bench.federated.execution import Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.secure import Secure
from gia_bench.federated.work import LocalWork
from gia_bench.metrics.assignment import match
from gia_bench.metrics.images import psnr_db
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet
from gia_bench.probes.malicious import play_malicious_round
from gia_bench.seeding import derive, seeded
from gia_bench.threat import ThreatModel
from gia_bench.values import Batch, Observation

LOKI = instantiate(OmegaConf.load(CONF / "attack" / "loki.yaml"), _convert_="all")
SUM = instantiate(OmegaConf.load(CONF / "threat" / "malicious_aggregate.yaml"), _convert_="all")
CLIENTS = instantiate(OmegaConf.load(CONF / "threat" / "malicious_model.yaml"), _convert_="all")
assert isinstance(LOKI, Loki) and isinstance(SUM, ThreatModel) and isinstance(CLIENTS, ThreatModel)
LEARNING_RATE = 0.01
"""Of FedAvg's local steps: small enough that rows stay where they were sent."""


def digits() -> InMemory:
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    # digits have 17 grey values, so that their means lie on the cuts without this
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    return InMemory(0.95 * images + 0.05 * noise, torch.tensor(data.target, dtype=torch.int64))


DIGITS = digits()


def victim_of(shape: tuple[int, int, int], *, normalised: bool = False) -> Victim:
    with seeded(0, "loki"):
        module = lenet(shape, 10, width=4)
    channels = torch.ones(shape[0])
    mean, std = (0.4 * channels, 0.25 * channels) if normalised else (None, None)
    return Victim(module=module, input_shape=shape, num_classes=10, mean=mean, std=std)


@dataclasses.dataclass(frozen=True)
class Played:
    victim: Victim
    seen: dict[int | None, Observation]
    cohort: Cohort
    sent: list[Broadcast]


def play(
    attack: Loki | RobbingTheFed,
    victim: Victim,
    threat: ThreatModel,
    local: LocalWork,
    *,
    num_clients: int = 4,
    each: int = 8,
    source: Source = DIGITS,
    aggregation: Aggregation | None = None,
) -> Played:
    """A malicious round as a run plays it, and what the threat model shows of it."""
    rows = torch.arange(num_clients * each).split(each)
    clients = tuple(range(10, 10 + num_clients))
    steps = [local.schedule(each, 3, 0, c) for c in clients]
    cohort = Cohort(
        round_index=0,
        clients=clients,
        steps=tuple(tuple(own[s] for s in of) for own, of in zip(rows, steps, strict=True)),
        weights=(each,) * num_clients,
        source=source,
    )
    rules = Rules(
        victim=victim, defense=NoDefense(), local=local, executor=Vmap(chunk_size=3), seed=3,
        aggregation=aggregation or Plain(),
    )  # fmt: skip
    server = Server(*victim.initial(), {})
    free = torch.arange(800, min(len(source.labels), 1700))
    public = InMemory(source.images(free), source.labels[free])
    played = play_malicious_round("loki", attack, rules, (server, {}), cohort, clients, threat, public)
    assert played.transcript is not None
    targets: list[int | None] = [*clients] if threat.sees_clients else [None]
    seen = {c: threat.observe(played.transcript, cohort, c, local=local) for c in targets}
    honest, seed = Broadcast(victim, server.params, server.buffers), derive(3, "tamper", "loki", 0)
    sent = [
        attack.tamper_for(honest, place, num_clients, seed=seed, public=public)
        for place in range(num_clients if attack.personal else 0)
    ]
    return Played(played.victim, seen, cohort, sent)


def bins_of(sent: Broadcast, images: Tensor) -> list[int]:
    """The one row that each image is inside (0, 1) of, from its pixels on, without any convolution."""
    if sent.victim.mean is not None and sent.victim.std is not None:
        images = (images - sent.victim.mean.view(-1, 1, 1)) / sent.victim.std.view(-1, 1, 1)
    kernels, weight = sent.params["imprint.sets.weight"], sent.params["imprint.weight"].double()
    C, H, W = images.shape[1:]
    num_sets = len(kernels) // (LOKI.copies * C + 1)
    of_set = weight.view(len(weight), num_sets, -1, H, W)
    place = int(kernels.view(num_sets, -1).any(1).nonzero())
    bins = []
    for image in images.double():
        values = [
            float((kernels.max() * image * row).sum() + bias)
            for row, bias in zip(of_set[:, place, :C], sent.params["imprint.bias"].double(), strict=True)
        ]
        [inside] = [i for i, value in enumerate(values) if 0 < value < 1]
        bins.append(inside)
    return bins


def alone_in_their_bins(played: Played) -> Tensor:
    """Of all images, client after client, which are the only ones of their client in their bin."""
    flags: list[bool] = []
    for client, sent in zip(played.cohort.clients, played.sent, strict=True):
        bins = bins_of(sent, played.cohort.truth((client,)).inputs)
        flags += [bins.count(b) == 1 for b in bins]
    return torch.tensor(flags)


def scored(attack: Loki | RobbingTheFed, played: Played) -> Tensor:
    """PSNR of all images, client after client."""
    parts = []
    for client, observation in played.seen.items():
        truth = played.cohort.truth(played.cohort.clients if client is None else (client,)).inputs
        found = attack.reconstruct(observation, played.victim).inputs.clamp(0, 1)
        parts.append(psnr_db(found[match(found, truth)], truth))
    return torch.cat(parts)


def test_the_paper_s_single_copy_needs_its_scaling_factor() -> None:
    local = FedAvg(learning_rate=LEARNING_RATE, epochs=1, batch_size=2)
    medians = []
    for scale in (1.0, 100.0, 1000.0):
        attack = dataclasses.replace(LOKI, num_bins=64, copies=1, gain=1.0, scale=scale)
        medians.append(float(scored(attack, play(attack, victim_of((1, 8, 8)), SUM, local)).median()))
    assert medians[0] < 15 < medians[1] < 60 < medians[2]


def test_a_large_learning_rate_and_several_epochs_leave_it_as_it_is() -> None:
    attack = dataclasses.replace(LOKI, num_bins=64)
    played = play(attack, victim_of((1, 8, 8)), SUM, FedAvg(learning_rate=1.0, epochs=3, batch_size=2))
    assert (scored(attack, played)[alone_in_their_bins(played)] > 60).all()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("threat", [SUM, CLIENTS], ids=lambda t: t.name)
@pytest.mark.parametrize(
    "local",
    [FedSGD(batch_size=8), FedAvg(learning_rate=LEARNING_RATE, epochs=1, batch_size=2)],
    ids=["fedsgd", "fedavg"],
)
def test_every_digit_of_every_client_alone_in_its_bin_is_found_above_60_db(
    local: LocalWork, threat: ThreatModel, normalised: bool
) -> None:
    attack = dataclasses.replace(LOKI, num_bins=64)
    played = play(attack, victim_of((1, 8, 8), normalised=normalised), threat, local)
    alone, scores = alone_in_their_bins(played), scored(attack, played)
    assert alone.sum() >= 20
    assert (scores[alone] > 60).all(), scores[alone].sort().values[:4]


@pytest.mark.parametrize(
    "local",
    [FedSGD(batch_size=8), FedAvg(learning_rate=LEARNING_RATE, epochs=1, batch_size=4)],
    ids=["fedsgd", "fedavg"],
)
def test_every_cifar_image_alone_in_its_bin_is_found_in_the_sum_above_60_db(local: LocalWork, data_root: Path) -> None:
    attack, data = dataclasses.replace(LOKI, num_bins=128), cifar10(root=data_root, verify=False)
    played = play(attack, victim_of((3, 32, 32)), SUM, local, source=data.train, num_clients=3)
    alone, scores = alone_in_their_bins(played), scored(attack, played)
    assert alone.float().mean() > 0.7
    assert (scores[alone] > 60).all(), scores[alone].sort().values[:4]


def test_nothing_of_one_client_is_in_the_columns_of_another() -> None:
    attack = dataclasses.replace(LOKI, num_bins=16)
    played = play(attack, victim_of((1, 8, 8)), CLIENTS, FedAvg(learning_rate=0.1, epochs=3, batch_size=4))
    for place, client in enumerate(played.cohort.clients):
        observation = played.seen[client]
        columns = observation.update["imprint.weight"].view(16, 4, -1)
        kernels = observation.update["imprint.sets.weight"].view(4, -1)
        for other in range(4):
            assert bool(columns[:, other].any()) == (other == place)
            assert bool(kernels[other].any()) == (other == place)
        assert all(torch.equal(observation.params[k], v) for k, v in played.sent[place].params.items())


def test_images_of_one_brightness_are_apart_by_client_where_robbing_the_fed_mixes_them() -> None:
    draw = torch.Generator().manual_seed(1)
    pixels = torch.rand(64, generator=draw)
    images = torch.stack([pixels[torch.randperm(64, generator=draw)] for _ in range(4)]).view(4, 1, 8, 8)
    source = InMemory(torch.cat([images, DIGITS.images(torch.arange(1000))]), torch.arange(1004) % 10)
    rob = RobbingTheFed(num_bins=32, functional=LOKI.functional)
    loki = dataclasses.replace(LOKI, num_bins=32)
    apart, mixed = (
        scored(a, play(a, victim_of((1, 8, 8)), SUM, FedSGD(batch_size=1), each=1, source=source)) for a in (loki, rob)
    )
    assert (apart > 60).all()
    assert (mixed < 30).all()


def test_by_the_paper_s_divisor_an_image_is_brighter_by_what_its_brightest_pixel_lacks() -> None:
    attack = dataclasses.replace(LOKI, num_bins=64, divisor="maximum")
    played = play(attack, victim_of((1, 8, 8)), CLIENTS, FedSGD(batch_size=1), each=1)
    for client, observation in played.seen.items():
        assert client is not None
        truth = played.cohort.truth((client,)).inputs
        found = attack.reconstruct(observation, played.victim).inputs
        torch.testing.assert_close(found, truth / truth.max(), atol=1e-4, rtol=0)


def test_differences_of_relu_rows_hold_the_same_images_after_one_step() -> None:
    victim, bands = victim_of((1, 8, 8)), dataclasses.replace(LOKI, num_bins=64)
    alone = alone_in_their_bins(play(bands, victim, SUM, FedSGD(batch_size=8)))
    relu = dataclasses.replace(bands, activation="relu")
    assert (scored(relu, play(relu, victim, SUM, FedSGD(batch_size=8)))[alone] > 60).all()


@pytest.mark.parametrize(
    "local", [FedSGD(batch_size=8), FedAvg(learning_rate=0.1, epochs=1, batch_size=2)], ids=["fedsgd", "fedavg"]
)
def test_masks_of_secure_aggregation_hide_nothing_from_it_but_the_last_digits(local: LocalWork) -> None:
    # large enough for the fixed point, small enough for rows to hold still
    attack = dataclasses.replace(LOKI, num_bins=64, scale=100.0, gain=1.0)
    played = play(attack, victim_of((1, 8, 8)), SUM, local, aggregation=Secure(clip=0.5))
    assert scored(attack, played)[alone_in_their_bins(played)].median() > 30


def test_the_planted_layer_on_hand_made_images() -> None:
    """Two clients, one grey image each, 0.25 and 0.75; bins are [0, 0.5) and [0.5, 1)."""

    @dataclasses.dataclass(frozen=True)
    class ByHand:
        requires = LOKI.bins.requires

        def cuts(self, num_bins: int, measure: object) -> Tensor:
            return torch.tensor([0.0, 0.5], dtype=torch.float64)

    attack = dataclasses.replace(LOKI, num_bins=2, bins=ByHand(), scale=4.0, gain=2.0)
    victim = victim_of((1, 8, 8))
    honest = Broadcast(victim, *victim.initial())
    for place, grey, rows in ((0, 0.25, (0.5, 0.0)), (1, 0.75, (1.0, 0.5))):
        sent = attack.tamper_for(honest, place, 2, seed=1)
        image = torch.full((1, 1, 8, 8), grey)
        block = sent.victim.module.get_submodule("imprint")
        with torch.no_grad():
            through, seen = block.get_submodule("sets")(image), block(image)
        expected = torch.zeros(1, 6, 8, 8)
        expected[0, 3 * place : 3 * place + 2], expected[0, 3 * place + 2] = 4 * grey, 4
        torch.testing.assert_close(through, expected)
        torch.testing.assert_close(seen, image + 2 * sum(rows) / 2)
        own = Batch(image, torch.tensor([3]), torch.ones(1))
        update = torch.func.grad(lambda p: sent.victim.objective(p, {}, own)[0])(sent.params)  # noqa: B023
        assert update["imprint.weight"].any(1).nonzero().flatten().tolist() == [place]


def test_what_loki_cannot_do_is_refused_with_a_way_out() -> None:
    with pytest.raises(IncompatibleError, match=r"take attack\.divisor=constant, or model\.normalize=false"):
        dataclasses.replace(LOKI, divisor="maximum").check_victim(victim_of((1, 8, 8), normalised=True))
    assert LOKI.max_local_steps is None
    assert dataclasses.replace(LOKI, activation="relu").max_local_steps == 1
    for change in (
        {"num_bins": 1}, {"scale": 0.0}, {"activation": "tanh"}, {"divisor": "mean"}, {"labels": "joint"},
        {"tolerance": 1.0}, {"copies": 3}, {"gain": 0.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="attack"):
            dataclasses.replace(LOKI, **change)  # type: ignore[arg-type]
