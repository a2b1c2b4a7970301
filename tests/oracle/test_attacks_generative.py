"""GGL, GIAS and GIFD against images that the generator can make, naive loops, and the package's own CMA-ES."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from attack_problems import Memory, Problem, double_backward_loss, psnr_db
from cmaes import CMA
from generator_problems import LATENT, Conditioned, Held, dcgan, in_range, resent
from torch import Tensor, nn

from gia_bench.attacks import telling
from gia_bench.attacks.arithmetic import Arithmetic
from gia_bench.attacks.base import FORGET
from gia_bench.attacks.distances import Cosine
from gia_bench.attacks.evolution import Evolution
from gia_bench.attacks.generative import Generative
from gia_bench.attacks.ggl import GGL, TensorMean
from gia_bench.attacks.gias import GIAS, RampUpDown
from gia_bench.attacks.gifd import GIFD, project
from gia_bench.attacks.group import Group
from gia_bench.attacks.latent_priors import KullbackLeibler, LatentNorm
from gia_bench.attacks.latents import LatentGroup, from_latents
from gia_bench.attacks.optimizers import Adam
from gia_bench.attacks.scene import PixelSpace
from gia_bench.defenses.base import Client
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError
from gia_bench.seeding import derive
from gia_bench.values import Batch, Reconstruction

SOURCE = Held(dcgan())
FAST = Adam(lr=0.1)


def ggl(generations: int = 60, **more: object) -> GGL:
    evolution = Evolution(generations=generations, population=16)
    return GGL(generator=SOURCE, evolution=evolution, **{"latent_priors": {}, "restarts": 3, **more})  # type: ignore[arg-type]


def gias(steps: int = 120, tuning_steps: int = 10, **more: object) -> GIAS:
    more = {"generator": SOURCE, "priors": {}, "optimizer": FAST, "restarts": 3, **more}
    return GIAS(steps=steps, tuning_steps=tuning_steps, **more)  # type: ignore[arg-type]


def gifd(steps: int = 120, **more: object) -> GIFD:
    more = {"generator": SOURCE, "priors": {}, "restarts": 3, **more}
    return GIFD(steps=steps, **more)  # type: ignore[arg-type]


SHORT: list[Generative] = [ggl(4, snapshot_every=2), gias(4, 4, snapshot_every=2), gifd(4, snapshot_every=2)]
KINDS = pytest.mark.parametrize("attack", SHORT, ids=lambda a: type(a).__name__)


def same(found: list[Reconstruction], expected: list[Reconstruction], tolerance: float = 0) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.inputs, b.inputs, rtol=tolerance, atol=tolerance)
        assert a.score == pytest.approx(b.score, rel=max(tolerance, 1e-12), abs=1e-12)
        assert a.failure == b.failure


def score(p: Problem, v: int, images: Tensor) -> float:
    return float(double_backward_loss(p.victim, p.observations[v], images, p.labels[v]).detach())


@pytest.mark.parametrize("attack", [ggl(), gias(), gifd()], ids=lambda a: type(a).__name__)
def test_an_image_that_the_generator_can_make_is_found(attack: Generative) -> None:
    p, _ = in_range(2, SOURCE)
    found = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    for v, r in enumerate(found):
        assert psnr_db(r.inputs, p.images[v]).min() > 30, v
        assert r.labels is not None and torch.equal(r.labels, p.labels[v])
    # which is not because all of its images look alike
    assert psnr_db(p.images[0], p.images[1]).max() < 20


def test_a_generator_whose_layers_are_all_told_the_latents_is_searched_layer_by_layer() -> None:
    """BigGAN's and StyleGAN's blocks: from the second layer on they are handed the latents that were found."""
    source = Held(Conditioned(), output_range=(-1.0, 1.0))
    p, _ = in_range(2, source)
    attack = gifd(generator=source)
    attack.check_victim(p.victim)
    for v, r in enumerate(attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])):
        assert psnr_db(r.inputs, p.images[v]).min() > 30, v


@pytest.mark.parametrize("attack", [gias(30, 20), gifd(30)], ids=lambda a: type(a).__name__)
def test_a_batch_is_searched_together(attack: Generative) -> None:
    p, _ = in_range(1, SOURCE, batch=2)
    shown = [dataclasses.replace(p.observations[0], labels=p.labels[0])]
    [found] = dataclasses.replace(attack, restarts=1).reconstruct_many(shown, p.victim, seeds=[0])
    assert found.inputs.shape == (2, 1, 8, 8)
    start = dataclasses.replace(attack, steps=1, restarts=1).reconstruct(shown[0], p.victim)
    assert found.score < start.score
    assert found.score == pytest.approx(score(p, 0, found.inputs), abs=1e-9)


@KINDS
def test_the_score_is_the_loss_of_the_returned_image(attack: Generative) -> None:
    p, _ = in_range(2, SOURCE, normalised=True)
    attack = dataclasses.replace(attack, distance=Cosine(), priors={})
    for v, r in enumerate(attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])):
        assert r.score == pytest.approx(score(p, v, r.inputs), abs=1e-9)


@KINDS
def test_a_victim_has_the_same_result_alone_and_in_any_batch_or_chunk(attack: Generative) -> None:
    p, _ = in_range(3, SOURCE)
    attack = dataclasses.replace(attack, restarts=2)
    together = attack.reconstruct_many(p.observations, p.victim, seeds=[3, 1, 4])
    alone = [attack.reconstruct(o, p.victim, seed=s) for o, s in zip(p.observations, [3, 1, 4], strict=True)]
    same(together, alone, 1e-6)
    for size in (1, 5):
        chunked = dataclasses.replace(attack, max_batch=size)
        same(chunked.reconstruct_many(p.observations, p.victim, seeds=[3, 1, 4]), alone, 1e-6)


@KINDS
def test_a_killed_attack_goes_on_to_the_result_of_one_that_was_not(attack: Generative) -> None:
    p, _ = in_range(2, SOURCE)
    whole = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    for saves in (1, 2, 3):
        killed = Memory(saves)
        try:
            attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1], snapshots=killed)
        except KeyboardInterrupt:
            killed.saves_to_live = None
        assert killed.kept
        same(attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1], snapshots=killed), whole)


@KINDS
def test_another_generator_does_not_pick_up_the_state_of_the_first(attack: Generative) -> None:
    p, _ = in_range(1, SOURCE)
    memory = Memory()
    attack.reconstruct_many(p.observations, p.victim, seeds=[0], snapshots=memory)
    before = set(memory.kept)
    other = dataclasses.replace(attack, generator=Other(dcgan()))
    other.reconstruct_many(p.observations, p.victim, seeds=[0], snapshots=memory)
    assert len(memory.kept) == 2 * len(before)


class Other:
    """The same settings, another file's content."""

    def __init__(self, module: nn.Module) -> None:
        self.inner = Held(module)

    def __repr__(self) -> str:
        return "Held()"

    def load(self) -> object:
        return dataclasses.replace(self.inner.load(), fingerprint="other")


@KINDS
def test_an_update_with_nan_fails_alone_and_says_where(attack: Generative) -> None:
    p, _ = in_range(3, SOURCE)
    broken = {k: v * torch.nan if k == "0.bias" else v for k, v in p.observations[1].update.items()}
    mixed = [p.observations[0], dataclasses.replace(p.observations[1], update=broken), p.observations[2]]
    found = attack.reconstruct_many(mixed, p.victim, seeds=[0, 1, 2])
    assert [r.failure is None for r in found] == [True, False, True]
    assert "NaN or infinity in 0.bias" in str(found[1].failure)
    assert all(r.inputs.isfinite().all() for r in found)
    fine = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
    same([found[0], found[2]], [fine[0], fine[2]], 1e-6)


@KINDS
def test_the_restart_with_the_lowest_loss_is_returned(attack: Generative) -> None:
    p, _ = in_range(2, SOURCE)
    one, many = (dataclasses.replace(attack, restarts=n) for n in (1, 4))
    singles = one.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    best = many.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    assert all(b.score <= s.score + 1e-12 for b, s in zip(best, singles, strict=True))


@pytest.mark.parametrize("lr", [1e-3, 10.0], ids=["small steps", "steps that lead astray"])
def test_gias_and_gifd_never_score_worse_than_their_own_latents(lr: float) -> None:
    p, _ = in_range(3, SOURCE)
    for attack, latents in (
        (gias(20, 20, tuning_optimizer=Adam(lr=lr)), gias(20, 0)),
        (gifd(20, optimizer=Adam(lr=lr)), gifd(20, optimizer=Adam(lr=lr), num_layers=0)),
    ):
        found = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
        first = latents.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
        assert all(a.score <= b.score for a, b in zip(found, first, strict=True))
        if lr < 1:
            assert any(a.score < b.score for a, b in zip(found, first, strict=True))


def test_an_image_outside_the_generators_range_is_found_by_tuning_it() -> None:
    """What latents alone cannot reach is the reason for both papers."""
    p, _ = in_range(2, SOURCE)
    images = (p.images + 0.15 * torch.rand_like(p.images)).clamp(0, 1)
    p = resent(p, images)
    latents = gias(80, 0).reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    for attack in (gias(80, 120), gifd(80, radii=(0.5, 0.5))):
        found = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
        gain = [psnr_db(a.inputs, x) - psnr_db(b.inputs, x) for a, b, x in zip(found, latents, images, strict=True)]
        assert torch.stack(gain).mean() > 1


def test_an_attacker_who_knows_the_defense_matches_what_it_left() -> None:
    """GGL under Top-k: the true latent has loss 0 through the defense's stand-in, and not without."""
    p, _ = in_range(1, SOURCE)
    defense = TopK(keep=0.3, error_feedback=ErrorFeedback(enabled=False))
    sent, _ = defense.protect(
        p.observations[0].update,
        Client(p.victim, p.observations[0].params, {}, Batch(p.images[0], p.labels[0], torch.ones(1))),
        {},
        {},
        {},
    )
    blind = dataclasses.replace(p.observations[0], update=sent)
    knowing = dataclasses.replace(blind, defense=defense)
    attack = ggl(80)
    found = {name: attack.reconstruct(o, p.victim) for name, o in (("blind", blind), ("knowing", knowing))}
    assert found["knowing"].score < 1e-3 * found["blind"].score
    assert psnr_db(found["knowing"].inputs, p.images[0]).item() > 30
    assert psnr_db(found["knowing"].inputs, p.images[0]) > psnr_db(found["blind"].inputs, p.images[0])


def grouped(p: Problem, distance: object, batch: int = 1, **more: object) -> LatentGroup:
    like = next(iter(p.observations[0].params.values()))
    group = Group.of(
        p.observations,
        p.victim,
        list(p.labels),
        PixelSpace.of(p.victim, like),
        distance,
        {},
        None,  # type: ignore[arg-type]
    )
    settings = {"penalties": {}, "restarts": 2, **more}
    classes = nn.functional.one_hot(group.seen.labels["labels"], 4).to(like)
    return LatentGroup(
        group=group, generator=SOURCE.load().like(like), classes=classes, seeds=[0] * len(p.labels), batch=batch,
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip


def naive(p: Problem, v: int, latent: Tensor) -> Tensor:
    """The mean over tensors of the squared differences, by plain autograd, for one latent [B, Z] of one victim."""
    classes = nn.functional.one_hot(p.labels[v], 4).to(latent)
    images = SOURCE.load().like(latent).module(latent, classes)
    params = {k: q.detach().clone().requires_grad_() for k, q in p.observations[v].params.items()}
    logits = torch.func.functional_call(p.victim.module, params, (images,))
    gradients = torch.autograd.grad(
        nn.functional.cross_entropy(logits, p.labels[v]), [*params.values()], create_graph=True
    )
    squares = [(g - p.observations[v].update[k]).square().sum() for k, g in zip(params, gradients, strict=True)]
    return torch.stack(squares).mean()


@pytest.mark.parametrize("max_batch", [None, 1, 4])
def test_a_population_at_once_has_the_losses_of_one_at_a_time(max_batch: int | None) -> None:
    p, _ = in_range(2, SOURCE)
    latent = grouped(p, TensorMean())
    latent = dataclasses.replace(latent, group=dataclasses.replace(latent.group, max_batch=max_batch))
    points = torch.randn(2, 7, 1, LATENT, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = latent.losses(from_latents(latent.generator), {"latents": points})
    expected = torch.tensor([[float(naive(p, v, points[v, i]).detach()) for i in range(7)] for v in range(2)])
    torch.testing.assert_close(losses, expected.double(), rtol=1e-6, atol=1e-12)


def test_gradients_through_the_generator_are_those_of_plain_autograd() -> None:
    p, _ = in_range(2, SOURCE)
    latent = grouped(p, TensorMean(), penalties={"norm": LatentNorm(weight=0.3)})
    points = torch.randn(2, 2, 1, LATENT, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, gradient = latent.objective(from_latents(latent.generator))({"latents": points})
    for v in range(2):
        for t in range(2):
            leaf = points[v, t].clone().requires_grad_()
            one = naive(p, v, leaf) + 0.3 * leaf.square().mean() / 2
            (expected,) = torch.autograd.grad(one, leaf)
            assert loss[v, t].item() == pytest.approx(one.item(), rel=1e-9)
            torch.testing.assert_close(gradient["latents"][v, t], expected, rtol=1e-7, atol=1e-12)


def test_the_strategies_of_a_batch_are_the_packages_own_run_one_by_one() -> None:
    target = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, 4.0]], dtype=torch.float64)

    def losses(points: Tensor) -> Tensor:
        return (points - target[:, None, None]).square().sum(-1)

    means, seeds = torch.zeros(2, 2, 3, dtype=torch.float64), [[1, 2], [3, 4]]
    evolution = Evolution(generations=25, population=8, sigma=0.7)
    best, loss = evolution.minimise(losses, means, seeds, FORGET, "key", 10)
    for v in range(2):
        for t in range(2):
            alone = CMA(mean=np.zeros(3), sigma=0.7, seed=seeds[v][t], population_size=8)
            lowest, where = np.inf, np.zeros(3)
            for _ in range(25):
                points = [alone.ask() for _ in range(8)]
                values = [float(((x - target[v].numpy()) ** 2).sum()) for x in points]
                alone.tell(list(zip(points, values, strict=True)))
                if min(values) < lowest:
                    lowest, where = min(values), points[int(np.argmin(values))]
            assert loss[v, t].item() == pytest.approx(lowest, rel=1e-9)
            torch.testing.assert_close(best[v, t], torch.from_numpy(where))
    assert loss.max() < 1e-2


def test_a_strategy_goes_on_where_some_points_have_no_loss_and_rests_where_none_has() -> None:
    def losses(points: Tensor) -> Tensor:
        value = points.square().sum(-1)
        value[0, 0, ::2] = torch.nan
        value[1] = torch.inf
        return value

    best, loss = Evolution(generations=30, population=8).minimise(
        losses, torch.ones(2, 1, 2, dtype=torch.float64), [[1], [2]], FORGET, "key", 5
    )
    assert loss[0, 0] < 1e-2
    assert loss[1, 0] == torch.inf
    assert torch.equal(best[1, 0], torch.ones(2, dtype=torch.float64))


def test_a_long_evolution_says_how_far_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "TELL_EVERY", 0.0)
    with caplog.at_level(logging.INFO, logger=Evolution.__module__):
        Evolution(generations=2, population=4).minimise(
            lambda points: points.square().sum(-1), torch.zeros(1, 1, 2), [[1]], FORGET, "key", 5
        )
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in said] == ["generation 1 of 2", "generation 2 of 2"]


def test_the_projection_on_an_l1_ball_is_the_nearest_point_of_it() -> None:
    """Against bisection on the threshold, point by point."""
    draw = torch.Generator().manual_seed(0)
    points, centre = (torch.randn(6, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    radius = torch.tensor([0.1, 1.0, 3.0, 5.0, 1e3, 1e-6], dtype=torch.float64)
    found = project(points, centre, radius)
    for x, c, r, y in zip(points, centre, radius, found, strict=True):
        low, high = 0.0, float((x - c).abs().max())
        for _ in range(200):
            middle = (low + high) / 2
            outside = (x - c).abs().sub(middle).clamp(min=0).sum() > r
            low, high = (middle, high) if outside else (low, middle)
        torch.testing.assert_close(y, c + (x - c).sign() * (x - c).abs().sub(high).clamp(min=0), atol=1e-9, rtol=0)
    assert torch.equal(found[4], points[4])


def test_features_stay_in_their_ball() -> None:
    p, _ = in_range(1, SOURCE)
    tight, wide = (gifd(10, radii=(r,)).reconstruct(p.observations[0], p.victim) for r in (1e-9, 0.5))
    none = gifd(10, num_layers=0).reconstruct(p.observations[0], p.victim)
    torch.testing.assert_close(tight.inputs, none.inputs, atol=1e-6, rtol=0)
    assert (wide.inputs - none.inputs).abs().max() > 1e-3


def test_the_penalties_on_latents_are_those_of_their_formulas() -> None:
    latents = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kl = KullbackLeibler(weight=0.1)(latents)
    normal = torch.distributions.Normal
    m, s = latents.mean(2), latents.std(2, correction=0)
    exact = torch.distributions.kl_divergence(normal(m, s), normal(torch.zeros_like(m), torch.ones_like(s)))
    torch.testing.assert_close(kl, 0.1 * exact.mean(1))
    torch.testing.assert_close(LatentNorm(weight=2.0)(latents), latents.square().mean((1, 2)))


def test_the_rate_rises_and_falls_as_in_the_released_code() -> None:
    rate = RampUpDown()
    assert [rate(0, 1000), rate(25, 1000), rate(50, 1000), rate(250, 1000)] == pytest.approx([0, 0.5, 1, 1])
    assert rate(625, 1000) == pytest.approx(0.5)
    assert 0 < rate(999, 1000) < 1e-4


def test_victims_have_first_latents_of_their_own() -> None:
    p, _ = in_range(2, SOURCE)
    latent = dataclasses.replace(grouped(p, TensorMean()), seeds=[derive(0, "a"), derive(0, "b")])
    drawn = latent.latents()
    assert drawn.shape == (2, 2, 1, LATENT)
    assert len({tuple(x.tolist()) for x in drawn.flatten(0, 1).flatten(1)}) == 4


@KINDS
def test_other_arithmetic_is_compared_with_plain_fp32_and_then_used(attack: Generative) -> None:
    p, _ = in_range(2, SOURCE, dtype=torch.float32)
    plain = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    found = dataclasses.replace(attack, arithmetic=Arithmetic(precision="bf16")).reconstruct_many(
        p.observations, p.victim, seeds=[0, 1]
    )
    for a, b in zip(found, plain, strict=True):
        # another arithmetic ranks a population in another order, so that searches part
        assert a.score != b.score
        assert b.score / 3 < a.score < b.score * 3
    strict = dataclasses.replace(attack, arithmetic=Arithmetic(precision="bf16", tolerance=1e-6))
    with pytest.raises(ConfigError, match=r"precision=bf16.*tolerance of 1e-06"):
        strict.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
