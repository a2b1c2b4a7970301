"""Labels, guesses, schedules, and the sentences for settings that cannot work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_problems import problem, psnr_db
from PIL import Image
from torch import Tensor, nn
from torch.func import grad

from gia_bench.attacks.analytic import Analytic
from gia_bench.attacks.batch_norm import InferredStatistics, RunningStatistics
from gia_bench.attacks.distances import Cosine, LayerCosine
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.forces import GroupConsistency, Langevin
from gia_bench.attacks.idlg import idlg
from gia_bench.attacks.initial import Filled, GivenImage, Initial, Patterned, Randn, Uniform, Zeros
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.label_inference import bias_corrected
from gia_bench.attacks.label_inference import idlg as idlg_label
from gia_bench.attacks.labels import METHODS
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam
from gia_bench.attacks.priors import IsotropicTotalVariation, Norm, PaddedTotalVariation, PixelRange, TotalVariation
from gia_bench.attacks.scene import Candidate
from gia_bench.attacks.schedules import Constant, CosineWarmup, StepDecay
from gia_bench.attacks.wrapped import Layers, Masked, Scaled, Weighted
from gia_bench.errors import ConfigError, DataError, IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.threat import Knowledge
from gia_bench.values import Batch, Observation

ANY: Any = None  # what these priors do not look at


def candidate(images: Tensor) -> Candidate:
    return Candidate(images, images, torch.zeros(len(images), dtype=torch.int64))


def test_dlg_recovers_images_and_returns_the_label_it_optimised() -> None:
    """At least half of the victims above 30 dB, and for those the label is right: it starts as random numbers."""
    p = problem(6, shape=(1, 16, 16), width=12)
    found = dlg(steps=40).reconstruct_many(p.observations, p.victim, seeds=range(6))
    quality = torch.stack([psnr_db(r.inputs, x)[0] for r, x in zip(found, p.images, strict=True)])
    solved = quality > 30
    assert solved.sum() >= 3
    for r, truth, well in zip(found, p.labels, solved, strict=True):
        assert r.labels is not None
        assert not well or torch.equal(r.labels, truth)


def test_idlg_recovers_an_image_whose_label_it_read() -> None:
    p = problem(6, shape=(1, 16, 16), width=12)
    found = idlg(steps=40).reconstruct_many(p.observations, p.victim, seeds=range(6))
    assert all(torch.equal(r.labels, y) for r, y in zip(found, p.labels, strict=True) if r.labels is not None)
    assert sum(psnr_db(r.inputs, x)[0] > 30 for r, x in zip(found, p.images, strict=True)) >= 3


def test_labels_of_a_whole_batch_are_read_off_the_bias_repeated_ones_too() -> None:
    """Small weights, so that every class is about equally likely and the counts show cleanly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 10))
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.01, 0.01)
    victim = Victim(module=net, input_shape=(1, 4, 4), num_classes=10)
    params, _ = victim.initial()
    labels = torch.tensor([0, 2, 2, 2, 4])
    batch = Batch(torch.rand(5, 1, 4, 4), labels, torch.ones(5))
    update = torch.func.grad(lambda p: victim.objective(p, {}, batch)[0])(params)
    o = Observation(params=params, update=update, num_examples=5)
    assert bias_corrected(o, victim).tolist() == labels.tolist()
    without_bias = {k: v for k, v in update.items() if k != "3.bias"}
    assert bias_corrected(dataclasses.replace(o, update=without_bias), victim).tolist() == labels.tolist()


def test_labels_that_are_shown_are_used_and_those_that_are_not_are_inferred() -> None:
    p = problem(1)
    o = p.observations[0]
    wrong = (p.labels[0] + 1) % 4
    shown = dataclasses.replace(o, labels=wrong)
    attack = inverting_gradients(steps=1)
    assert torch.equal(attack.reconstruct(shown, p.victim).labels, wrong)  # type: ignore[arg-type]
    assert torch.equal(attack.reconstruct(o, p.victim).labels, p.labels[0])  # type: ignore[arg-type]
    known = dataclasses.replace(attack, labels="known")
    assert torch.equal(known.reconstruct(shown, p.victim).labels, wrong)  # type: ignore[arg-type]
    with pytest.raises(IncompatibleError, match="does not show the labels"):
        known.reconstruct(o, p.victim)


def test_requirements_follow_from_the_settings() -> None:
    assert dlg().requires == Knowledge.NUM_EXAMPLES
    assert inverting_gradients(labels="known").requires == Knowledge.NUM_EXAMPLES | Knowledge.LABELS


def test_step_decay_falls_at_three_five_and_seven_eighths() -> None:
    decay = StepDecay()
    rates = [decay(step, 24_000) for step in (0, 8_999, 9_000, 14_999, 15_000, 20_999, 21_000, 23_999)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])
    assert Constant()(5, 10) == 1


def test_cosine_with_warm_up_rises_in_a_line_and_falls_to_nothing() -> None:
    rates = [CosineWarmup(warmup=4)(step, 104) for step in (0, 1, 2, 3, 4, 54, 103)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5, 0], abs=3e-4)
    assert CosineWarmup(warmup=4)(3, 4) == 1
    plain = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 10)
    for step in range(10):
        assert CosineWarmup(warmup=0)(step, 10) == pytest.approx(plain.get_last_lr()[0])
        plain.optimizer.step()
        plain.step()


def test_a_pattern_repeats_one_tile_of_its_own_for_every_image_and_channel() -> None:
    image = Patterned(width=4, tile=Uniform())((2, 3, 10, 9), stream(0, "initial"), torch.float64)
    assert image.shape == (2, 3, 10, 9)
    tile = image[..., :4, :4]
    for y in range(10):
        for x in range(9):
            assert torch.equal(image[..., y, x], tile[..., y % 4, x % 4])
    assert len(set(tile.flatten().tolist())) == tile.numel()
    larger = Patterned(width=16)((1, 1, 5, 5), stream(0, "initial"), torch.float64)
    assert len(set(larger.flatten().tolist())) == 25


def test_a_filled_start_is_one_number_and_does_not_fill_the_labels_that_are_searched() -> None:
    p = problem(1)
    attack = dlg(steps=1, initial=Filled(value=0.25), optimizer=Adam(lr=1e-20))
    found = [attack.reconstruct(p.observations[0], p.victim, seed=seed) for seed in range(3)]
    for r in found:
        torch.testing.assert_close(r.inputs, torch.full_like(r.inputs, 0.25))
    assert len({r.score for r in found}) == 3, "the same image, with other labels each time"


def test_initial_guesses_come_from_their_stream_and_have_their_range() -> None:
    drawn: list[Initial] = [Randn(), Uniform(low=-1, high=2), Patterned(width=4), Zeros(), Filled(value=0.5)]
    for initial in drawn:
        draws = [initial((4, 50), stream(0, "initial", t), torch.float32) for t in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1])
        assert torch.equal(draws[0], draws[2]) == isinstance(initial, Zeros | Filled)
    uniform = Uniform(low=-1, high=2)((1000,), stream(0, "u"), torch.float64)
    assert -1 <= uniform.min() < -0.9
    assert 1.9 < uniform.max() < 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: dlg(steps=0), "attack.steps=0: give at least 1"),
        (lambda: dlg(restarts=0), "attack.restarts=0"),
        (lambda: dlg(max_batch=0), "attack.max_batch=0: give at least 1, or null"),
        (lambda: dlg(snapshot_every=0), "attack.snapshot_every=0"),
        (lambda: dlg(labels="guess"), "Choose one of: auto, bias_corrected, bias_gradient, gradinversion, idlg, ilrg"),
        (lambda: Adam(lr=0), "adam.lr=0: give a number above 0"),
        (lambda: Adam(beta1=1), "adam.beta1=1"),
        (lambda: Adam(beta2=-1), "adam.beta2=-1"),
        (lambda: Adam(eps=0), "adam.eps=0"),
        (lambda: LBFGS(lr=-1), "lbfgs.lr=-1"),
        (lambda: LBFGS(max_iter=0), "lbfgs.max_iter=0"),
        (lambda: LBFGS(history=0), "lbfgs.history=0"),
        (lambda: LBFGS(tolerance_grad=-1), "lbfgs.tolerance_grad=-1"),
        (lambda: LBFGS(tolerance_change=-1), "lbfgs.tolerance_change=-1"),
        (lambda: TotalVariation(weight=-1), "total_variation.weight=-1"),
        (lambda: PaddedTotalVariation(weight=-1), "padded_total_variation.weight=-1"),
        (lambda: Norm(weight=-1), "norm.weight=-1"),
        (lambda: Uniform(low=1, high=1), "uniform.low=1"),
        (lambda: StepDecay(milestones=(0.5, 1.0)), "milestones"),
        (lambda: StepDecay(factor=0), "factor=0"),
        (lambda: CosineWarmup(warmup=-1), "cosine_warmup.warmup=-1"),
        (lambda: Patterned(width=0), "patterned.width=0"),
        (lambda: Langevin(scale=-1), "langevin.scale=-1"),
        (lambda: GroupConsistency(weight=-1), "group_consistency.weight=-1"),
        (lambda: GroupConsistency(weight=1, start=-1), "group_consistency.start=-1"),
        (lambda: RunningStatistics(weight=-1), "batch_norm.weight=-1"),
        (lambda: InferredStatistics(weight=1, first=-1), "batch_norm.first=-1"),
        (lambda: Masked(distance=Cosine(), threshold=-1), "masked.threshold=-1"),
        (lambda: Scaled(distance=Cosine(), factor=0), "scaled.factor=0"),
        (lambda: Layers(distance=Cosine(), layers="last"), "Choose one of: all, all_but_last, all_conv, fc"),
        (lambda: Weighted(distance=Cosine(), weights="none"), "Choose one of: exp, linear"),
        (lambda: Weighted(distance=LayerCosine()), "give a distance that has lengths"),
        (lambda: Analytic(labels="joint"), "Choose one of: auto, bias_corrected"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_to_give(make: object, sentence: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_observations_that_cannot_be_matched_are_refused_with_a_way_out() -> None:
    p = problem(1)
    o, v = p.observations[0], p.victim
    attack: GradientMatching = inverting_gradients(steps=1)
    cases = [
        (dataclasses.replace(o, num_examples=None), "shows num_examples"),
        (dataclasses.replace(o, update={}), "nothing to match"),
        (dataclasses.replace(o, update={"0.weight": torch.zeros(2)}), r"shape \(2,\)"),
        (dataclasses.replace(o, update={"nobody": torch.zeros(2)}), "no such parameter"),
        (dataclasses.replace(o, labels=torch.zeros(3, dtype=torch.int64)), r"expected \(1,\)"),
        (dataclasses.replace(o, update={"0.weight": o.update["0.weight"]}), "no last linear layer"),
    ]
    for observation, sentence in cases:
        with pytest.raises(IncompatibleError, match=sentence):
            attack.reconstruct(observation, v)
    with pytest.raises(IncompatibleError, match="reads one label and this update holds 2"):
        idlg().reconstruct(problem(1, batch=2).observations[0], v)


def test_a_part_of_the_update_is_enough_to_match() -> None:
    p = problem(1)
    o = p.observations[0]
    part = {k: t for k, t in o.update.items() if k.startswith("0")}
    found = dlg(steps=1).reconstruct(dataclasses.replace(o, update=part), p.victim)
    assert found.failure is None


def test_every_label_method_can_be_chosen_and_idlg_is_the_row_with_the_smallest_sum() -> None:
    p = problem(1)
    inferred = {"idlg", "bias_gradient", "bias_corrected", "llg", "ilrg", "gradinversion"}
    assert set(METHODS) == {"auto", "known", "joint"} | inferred
    rows = p.observations[0].update["5.weight"].sum(1)
    assert idlg_label(p.observations[0], p.victim).item() == min(range(4), key=lambda c: float(rows[c]))


def test_isotropic_total_variation_is_numpys_and_the_same_for_a_turned_image() -> None:
    prior, x = IsotropicTotalVariation(weight=2.0), torch.rand(2, 3, 5, 7)
    dx, dy = np.diff(x.numpy(), axis=3)[:, :, :-1], np.diff(x.numpy(), axis=2)[..., :-1]
    assert float(prior(candidate(x), ANY)) == pytest.approx(2 * np.sqrt(dx**2 + dy**2 + 1e-8).mean(), rel=1e-5)
    edge = torch.zeros(1, 1, 9, 9)
    edge[..., 4:] = 1
    flat = grad(lambda p: prior(candidate(p), ANY))(torch.zeros(1, 1, 4, 4))
    assert flat.isfinite().all()
    assert float(prior(candidate(edge), ANY)) == pytest.approx(float(prior(candidate(edge.mT), ANY)))


def test_the_pixel_range_costs_nothing_inside_and_squares_outside() -> None:
    prior = PixelRange(weight=4.0)
    assert float(prior(candidate(torch.rand(2, 1, 3, 3)), ANY)) == 0
    assert float(prior(candidate(torch.tensor([[[[-0.5, 0.0, 1.0, 2.5]]]])), ANY)) == pytest.approx(4 * 2.5 / 4)


def test_a_search_can_start_from_a_picture(tmp_path: Path) -> None:
    levels = torch.arange(64, dtype=torch.uint8).view(1, 8, 8) * 4
    file = tmp_path / "guess.png"
    Image.fromarray(levels[0].numpy()).save(file)
    p = problem(1, normalised=True)
    attack = dlg(steps=1, initial=GivenImage(path=str(file)), optimizer=Adam(lr=1e-20))
    [found] = attack.reconstruct_many(p.observations, p.victim, seeds=[0])
    assert torch.allclose(found.inputs[0], levels / 255, atol=1e-6)
    with pytest.raises(DataError, match="cannot be read as a picture"):
        dlg(steps=1, initial=GivenImage(path=str(tmp_path / "none.png"))).reconstruct_many(
            p.observations, p.victim, seeds=[0]
        )
