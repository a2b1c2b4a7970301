"""Planted layers and planted parameters: exact on hand-made and on real images, and what protection leaves of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gia_bench.attacks.base import Attack, Broadcast
from gia_bench.attacks.curious_abandon_honesty import CuriousAbandonHonesty
from gia_bench.attacks.fishing import ClassFishing
from gia_bench.attacks.imprint import Average, Fourier, Functional, Laplace, Measured, Normal, Random
from gia_bench.attacks.robbing import RobbingTheFed
from gia_bench.conf_path import CONF
from gia_bench.data.cifar import cifar10
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.metrics.assignment import match
from gia_bench.metrics.images import psnr_db
from gia_bench.models.functional import Victim
from gia_bench.models.imprint import in_front
from gia_bench.models.lenet import lenet
from gia_bench.models.resnet import cifar_resnet
from gia_bench.seeding import seeded
from gia_bench.values import Batch, Examples, Observation, Update


def preset(name: str) -> Attack:
    attack = instantiate(OmegaConf.load(CONF / "attack" / f"{name}.yaml"), _convert_="all")
    assert isinstance(attack, Attack)
    return attack


ROB = preset("robbing_the_fed")
CAH = preset("curious_abandon_honesty")
FISHING = preset("class_fishing")
assert isinstance(ROB, RobbingTheFed) and isinstance(CAH, CuriousAbandonHonesty) and isinstance(FISHING, ClassFishing)


@dataclasses.dataclass(frozen=True)
class Pictures:
    images_: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        return self.images_[indices]


def digits(start: int, count: int) -> Pictures:
    data = load_digits()
    images = torch.tensor(data.images[start : start + count] / 16, dtype=torch.float32)[:, None]
    return Pictures(images, torch.tensor(data.target[start : start + count], dtype=torch.int64))


PUBLIC = digits(1000, 500)


def victim_of(shape: tuple[int, int, int], *, normalised: bool = False, deep: bool = False) -> Victim:
    with seeded(0, "malicious"):
        module = cifar_resnet(shape, 10, depth=8, width=4) if deep else lenet(shape, 10, width=4)
    channels = torch.ones(shape[0])
    mean, std = (0.4 * channels, 0.25 * channels) if normalised else (None, None)
    return Victim(module=module, input_shape=shape, num_classes=10, mean=mean, std=std)


def play(
    attack: Attack, victim: Victim, batch: Pictures, public: Examples = PUBLIC, defense: Defense | None = None
) -> tuple[Broadcast, Observation]:
    """What is sent to a client that holds ``batch``, and what is seen of its update."""
    sent = attack.tamper(Broadcast(victim, *victim.initial()), seed=1, public=public)
    own = Batch(batch.images_, batch.labels, torch.ones(len(batch)))
    update: Update = torch.func.grad(lambda p: sent.victim.objective(p, sent.buffers, own)[0])(sent.params)
    if defense is not None:
        client = Client(sent.victim, sent.params, sent.buffers, Batch(*(t[None] for t in own)))
        update, _ = defense.protect(update, client, defense.init_client(sent.params), {}, {})
    return sent, Observation(params=sent.params, buffers=sent.buffers, update=update, num_examples=len(batch))


def bins_of(sent: Broadcast, batch: Pictures) -> list[int]:
    """The bin of each image: how many rows it switches on, counted one image and one row at a time."""
    weight, bias = sent.params["imprint.weight"].double(), sent.params["imprint.bias"].double()
    images = batch.images_.double()
    if sent.victim.mean is not None and sent.victim.std is not None:
        images = (images - sent.victim.mean.view(-1, 1, 1)) / sent.victim.std.view(-1, 1, 1)
    return [sum(int(float(w @ x.flatten()) + float(b) > 0) for w, b in zip(weight, bias, strict=True)) for x in images]


def scored(attack: Attack, sent: Broadcast, seen: Observation, batch: Pictures) -> Tensor:
    found = attack.reconstruct(seen, sent.victim).inputs.clamp(0, 1)
    return psnr_db(found[match(found, batch.images_)], batch.images_)


@pytest.mark.parametrize("normalised", [False, True])
# "linear" saturates sigmoids, and the smallest gradients are lost
@pytest.mark.parametrize(
    ("deep", "connection"),
    [(False, "addition"), (False, "linear_mean"), (True, "addition"), (True, "linear")],
)
@pytest.mark.parametrize("functional", [Random(), Fourier(), Average()], ids=str)
def test_every_digit_alone_in_its_bin_is_found_above_60_db(
    normalised: bool, deep: bool, connection: str, functional: Functional
) -> None:
    attack = dataclasses.replace(ROB, connection=connection, functional=functional)  # type: ignore[type-var]
    batch = digits(0, 24)
    # digits have 17 grey values, so that their means lie on the cuts without this
    noise = torch.rand(batch.images_.shape, generator=torch.Generator().manual_seed(0))
    batch = Pictures(0.95 * batch.images_ + 0.05 * noise, batch.labels)
    sent, seen = play(attack, victim_of((1, 8, 8), normalised=normalised, deep=deep), batch)
    own = bins_of(sent, batch)
    alone = torch.tensor([own.count(b) == 1 for b in own])
    assert alone.sum() > 8
    scores = scored(attack, sent, seen, batch)
    assert (scores[alone] > 60).all(), (scores[alone].min(), alone.sum())


@pytest.mark.parametrize("size", [8, 64])
def test_every_cifar_image_alone_in_its_bin_is_found_above_60_db(size: int, data_root: Path) -> None:
    data = cifar10(root=data_root, verify=False)
    rows = torch.arange(size)
    batch = Pictures(data.train.images(rows), data.train.labels[rows])
    sent, seen = play(ROB, victim_of((3, 32, 32)), batch, public=data.test)
    own = bins_of(sent, batch)
    alone = torch.tensor([own.count(b) == 1 for b in own])
    scores = scored(ROB, sent, seen, batch)
    assert (scores[alone] > 60).all()
    assert alone.float().mean() > 0.5


def test_two_images_in_one_bin_give_a_mean_of_them_weighted_by_their_gradients() -> None:
    attack = dataclasses.replace(ROB, num_bins=1)  # type: ignore[type-var]
    batch = digits(0, 2)
    sent, seen = play(attack, victim_of((1, 8, 8)), batch)
    shares = []
    for i in range(2):
        one = Batch(batch.images_[i : i + 1], batch.labels[i : i + 1], torch.ones(1))
        shares.append(torch.func.grad(lambda p: sent.victim.objective(p, {}, one)[0])(sent.params)["imprint.bias"])  # noqa: B023
    share = (shares[0] / (shares[0] + shares[1])).view(1, 1, 1)
    found = attack.reconstruct(seen, sent.victim)
    mean = share * batch.images_[0] + (1 - share) * batch.images_[1]
    torch.testing.assert_close(found.inputs[0], mean, atol=1e-4, rtol=0)
    assert not found.inputs[1].any()
    assert found.score == 0.5


def test_the_layer_s_gradient_on_a_hand_made_batch() -> None:
    """Pixels sum to 1, 2 and 4; bins begin below 0, at 1.5 and at 3; every image's gradient into the layer is known."""
    victim = Victim(module=nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), input_shape=(1, 2, 2), num_classes=2)
    images = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 1.0, 1.0]]).view(3, 1, 2, 2)

    @dataclasses.dataclass(frozen=True)
    class ByHand:
        requires = Normal().requires

        def cuts(self, num_bins: int, measure: object) -> Tensor:
            return torch.tensor([-1.0, 1.5, 3.0], dtype=torch.float64) / 4

    attack = dataclasses.replace(ROB, num_bins=3, functional=Average(), bins=ByHand(), gain=1.0)  # type: ignore[type-var]
    batch = Pictures(images, torch.tensor([0, 1, 0]))
    sent, seen = play(attack, victim, batch)
    torch.testing.assert_close(sent.params["imprint.weight"], torch.full((3, 4), 0.25))
    torch.testing.assert_close(sent.params["imprint.bias"], torch.tensor([0.25, -0.375, -0.75]))
    hidden = torch.tensor([[0.5, 0, 0], [0.75, 0.125, 0], [1.25, 0.625, 0.25]])
    x = (images.flatten(1) + hidden.mean(1, keepdim=True)).requires_grad_()
    linear = victim.module[1]  # type: ignore[index]
    nn.functional.cross_entropy(linear(x), batch.labels).backward()
    assert x.grad is not None
    delta = x.grad.sum(1) / 3  # into each row that is on
    on = (hidden > 0).float()
    torch.testing.assert_close(seen.update["imprint.bias"], on.T @ delta)
    torch.testing.assert_close(seen.update["imprint.weight"], on.T @ (delta[:, None] * images.flatten(1)))
    found = attack.reconstruct(seen, sent.victim).inputs
    torch.testing.assert_close(found[match(found, images)], images, atol=1e-5, rtol=0)


def test_bins_hold_equal_shares_of_what_they_are_made_for() -> None:
    draw = torch.Generator().manual_seed(0)
    normal = 2 + 3 * torch.randn(40_000, generator=draw, dtype=torch.float64)
    uniform = torch.rand(40_000, generator=draw, dtype=torch.float64) - 0.5
    laplace = 2 - 3 / 2**0.5 * uniform.sign() * torch.log1p(-2 * uniform.abs())
    for bins, values in ((Normal(location=2, scale=3), normal), (Laplace(location=2, scale=3), laplace)):
        cuts = bins.cuts(8, lambda n: torch.empty(0))
        assert len(cuts) == 8 and (cuts.diff() > 0).all() and cuts[0] == 2 - 30
        held = torch.bucketize(values, cuts).bincount(minlength=9).double() / len(values)
        torch.testing.assert_close(held, torch.tensor([0.0] + 8 * [0.125], dtype=torch.float64), atol=0.01, rtol=0)
    cuts = Measured(num_examples=40_000).cuts(8, lambda n: normal[:n])
    assert torch.bucketize(normal, cuts).bincount().tolist() == [0] + 8 * [5000]
    # the reference's cuts for the Fourier functional: Laplace(0, 1 / sqrt(2))
    torch.testing.assert_close(
        Laplace().cuts(4, lambda n: torch.empty(0))[1:],
        torch.distributions.Laplace(0.0, 0.5**0.5).icdf(torch.tensor([0.25, 0.5, 0.75])).double(),
    )


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("num_bins", [4, 64, 128])
def test_no_image_lies_where_measured_bins_are_cut(num_bins: int, normalised: bool) -> None:
    """Digits have seventeen grey levels, and so few brightnesses that many images share one; normalised, they differ in
    their last places."""
    digits = torch.from_numpy(load_digits().images / 16)
    images = (digits - 0.3053) / 0.3765 if normalised else digits
    brightness = images.flatten(1).mean(1)
    cuts = Measured(num_examples=500).cuts(num_bins, lambda n: brightness[:n])
    assert len(cuts) == num_bins and (cuts.diff() > 0).all()
    nearest = (brightness[:, None] - cuts).abs().amin()
    assert nearest > 1e-6
    # no bin takes what belongs to another: at most one brightness more or less than an equal share
    held = torch.bucketize(brightness[:500], cuts).bincount(minlength=num_bins + 1)
    assert held[0] == 0 and held.cumsum(0)[-1] == 500
    if num_bins == 4:
        assert (held[1:] - 125).abs().amax() <= 25


def test_functionals_are_the_published_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    randn = Random()(3072, draw)
    assert randn.norm() == pytest.approx(1, rel=1e-3) and abs(float(randn.mean())) < 1e-12
    assert Average()(50, draw) @ torch.arange(50, dtype=torch.float64) == pytest.approx(24.5)
    fourier = Fourier(mode=2)(4, draw)
    expected = [4 * 2 / 4 * torch.tensor(3.141592653589793 / 4 * (n + 0.5) * 2).cos().item() for n in range(4)]
    torch.testing.assert_close(fourier, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("defense", [DGP(), TopK(error_feedback=ErrorFeedback(enabled=False))], ids=["dgp", "top_k"])
def test_pruning_breaks_the_division(defense: Defense) -> None:
    batch = digits(0, 16)
    victim = victim_of((1, 8, 8))
    plain, pruned = (scored(ROB, *play(ROB, victim, batch, defense=d), batch) for d in (None, defense))
    assert plain.median() > 60
    assert pruned.median() < 20
    assert (pruned > 60).sum() == 0


def test_of_more_hits_than_images_the_largest_or_the_smallest_are_kept() -> None:
    batch = digits(0, 12)
    sent, seen = play(ROB, victim_of((1, 8, 8)), batch)
    few = dataclasses.replace(seen, num_examples=3)
    everything = ROB.reconstruct(seen, sent.victim).inputs
    strong = ROB.reconstruct(few, sent.victim).inputs
    torch.testing.assert_close(strong, everything[:3])
    weak = dataclasses.replace(ROB, keep="smallest").reconstruct(few, sent.victim).inputs  # type: ignore[type-var]
    hits = int(everything.flatten(1).any(1).sum())
    torch.testing.assert_close(weak.flip(0), everything[hits - 3 : hits])


def test_trap_weights_are_negative_on_exactly_half_of_the_pixels_and_outweigh_the_rest() -> None:
    weights = CAH.trap_weights(101, torch.Generator().manual_seed(0))
    assert weights.shape == (64, 101)
    assert ((weights < 0).sum(1) == 50).all() and ((weights > 0).sum(1) == 50).all()
    for row in weights:
        torch.testing.assert_close(row[row > 0].sort().values, (-0.95 * row[row < 0]).sort().values)
    assert weights[weights < 0].abs().mean() == pytest.approx(0.5 * (2 / torch.pi) ** 0.5, rel=0.05)
    assert len({tuple((row < 0).tolist()) for row in weights}) == 64


@pytest.mark.parametrize("normalised", [False, True])
def test_an_image_that_switches_a_trap_row_on_alone_is_found_above_60_db(normalised: bool) -> None:
    attack = dataclasses.replace(CAH, num_rows=256)  # type: ignore[type-var]
    batch = digits(0, 8)
    victim = victim_of((1, 8, 8), normalised=normalised)
    sent, seen = play(attack, victim, batch)
    images = batch.images_ if victim.mean is None else (batch.images_ - victim.mean) / victim.std
    on = images.flatten(1) @ sent.params["imprint.weight"].T + sent.params["imprint.bias"] > 0
    alone = on[:, on.sum(0) == 1]
    assert alone.any(1).sum() >= 4
    assert (scored(attack, sent, seen, batch)[alone.any(1)] > 60).all()


def test_trap_rows_switch_the_same_images_on_whether_the_victim_normalises_or_not() -> None:
    batch = digits(0, 8)
    on = []
    for normalised in (False, True):
        sent, _ = play(CAH, victim_of((1, 8, 8), normalised=normalised), batch)
        images = batch.images_ if not normalised else (batch.images_ - 0.4) / 0.25
        on.append(images.flatten(1) @ sent.params["imprint.weight"].T + sent.params["imprint.bias"] > 1e-7)
    assert torch.equal(*on)


def fishing(target: int | None = 3, steps: int = 2) -> ClassFishing:
    assert isinstance(FISHING, ClassFishing)
    inner = dataclasses.replace(FISHING.attack, steps=steps)
    return dataclasses.replace(FISHING, target_class=target, attack=inner)


def test_fishing_leaves_only_the_target_s_examples_below_the_last_layer() -> None:
    batch = digits(0, 10)  # one digit of each class
    victim, attack = victim_of((1, 8, 8)), fishing()
    sent, seen = play(attack, victim, batch)
    assert sent.victim is victim and list(sent.params) == list(victim.initial()[0])
    alone = Batch(batch.images_[3:4], batch.labels[3:4], torch.ones(1))
    expected = torch.func.grad(lambda p: victim.objective(p, {}, alone)[0])(sent.params)
    for name in expected:
        if not name.startswith("fc"):
            torch.testing.assert_close(10 * seen.update[name], expected[name])
            assert expected[name].any()


def test_fishing_counts_the_labels_exactly_and_says_when_the_class_is_absent() -> None:
    batch = digits(0, 25)
    found = fishing().reconstruct(play(fishing(), victim_of((1, 8, 8)), batch)[1], victim_of((1, 8, 8)))
    assert found.labels is not None
    assert found.labels.tolist() == batch.labels.sort().values.tolist()
    count = int((batch.labels == 3).sum())
    assert found.inputs[:count].flatten(1).any(1).all() and not found.inputs[count:].any()
    without = Pictures(batch.images_[batch.labels != 3], batch.labels[batch.labels != 3])
    absent = fishing().reconstruct(play(fishing(), victim_of((1, 8, 8)), without)[1], victim_of((1, 8, 8)))
    assert absent.failure == "the update holds no example of class 3, which was fished for"


def test_fishing_finds_what_its_attack_finds_when_the_image_is_alone() -> None:
    batch, victim = digits(0, 10), victim_of((1, 8, 8))
    attack = fishing(steps=10)
    found = attack.reconstruct(play(attack, victim, batch)[1], victim, seed=4)
    lonely = Pictures(batch.images_[3:4], batch.labels[3:4])
    seen = play(attack, victim, lonely)[1]
    body = {k: v for k, v in seen.update.items() if not k.startswith("fc")}
    alone = attack.attack.reconstruct(dataclasses.replace(seen, update=body, labels=lonely.labels), victim, seed=4)
    torch.testing.assert_close(found.inputs[:1], alone.inputs, atol=1e-3, rtol=0)
    assert found.score == pytest.approx(alone.score, abs=1e-4)


def test_the_honest_model_is_whole_inside_the_malicious_one_and_untouched() -> None:
    victim = victim_of((1, 8, 8), deep=True)
    before = {k: v.clone() for k, v in victim.module.state_dict().items()}
    params, buffers = victim.initial()
    params = {k: v + 1 for k, v in params.items()}
    for attack in (ROB, CAH):
        sent = attack.tamper(Broadcast(victim, params, buffers), seed=1, public=PUBLIC)
        assert {k for k in sent.params if k not in params} == {"imprint.weight", "imprint.bias"}
        assert all(torch.equal(sent.params[k], v) for k, v in params.items())
        assert sent.victim.head == victim.head
        assert not any(v.requires_grad for v in sent.params.values())
        # rows that are never on change nothing: the rest of the malicious model is the honest one
        silent = {**sent.params, "imprint.bias": torch.full_like(sent.params["imprint.bias"], -1e6)}
        images = digits(0, 4).images_
        torch.testing.assert_close(
            sent.victim.logits(silent, buffers, images)[0], victim.logits(params, buffers, images)[0]
        )
    assert all(torch.equal(v, before[k]) for k, v in victim.module.state_dict().items())


def test_what_cannot_be_played_is_refused_with_a_way_out() -> None:
    sent, seen = play(ROB, victim_of((1, 8, 8)), digits(0, 4))
    honest = dataclasses.replace(seen, update={"fc.weight": seen.update["fc.weight"]})
    with pytest.raises(IncompatibleError, match=r"Let the clients play on the broadcast that the attack's tamper"):
        ROB.reconstruct(honest, sent.victim)
    with pytest.raises(IncompatibleError, match="a threat that shows num_examples"):
        ROB.reconstruct(dataclasses.replace(seen, num_examples=None), sent.victim)
    broken = ROB.reconstruct(
        dataclasses.replace(seen, update={**seen.update, "imprint.bias": seen.update["imprint.bias"] * torch.nan}),
        sent.victim,
    )
    assert broken.failure is not None and broken.inputs.isfinite().all()
    with pytest.raises(IncompatibleError, match="No layer can be put in front"):
        in_front(nn.Identity(), in_front(nn.Identity(), nn.Sequential(nn.Flatten())))
    biasless = dataclasses.replace(
        victim_of((1, 8, 8)), module=nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    )
    with pytest.raises(IncompatibleError, match="ends in a linear layer with a bias"):
        fishing().check_victim(biasless)
    with pytest.raises(IncompatibleError, match="the model has 10 classes"):
        fishing(target=10).check_victim(victim_of((1, 8, 8)))
    for change in ({"num_bins": 0}, {"gain": 0.0}, {"connection": "cat"}, {"keep": "all"}, {"labels": "joint"}):
        with pytest.raises(ConfigError, match="attack"):
            dataclasses.replace(ROB, **change)  # type: ignore[type-var, arg-type]
    with pytest.raises(ConfigError, match=r"attack\.scale=1\.5"):
        dataclasses.replace(CAH, scale=1.5)  # type: ignore[type-var]
