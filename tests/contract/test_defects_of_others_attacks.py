"""Attacks: defects that other benches had, see docs/defects.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from attack_problems import problem, psnr_db
from torch import Tensor, nn

from gia_bench.attacks.batch_norm import InferredStatistics, RunningStatistics
from gia_bench.attacks.distances import Euclidean
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.forces import GroupConsistency, Langevin
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.optimizers import Adam
from gia_bench.attacks.priors import IsotropicTotalVariation, Norm, PaddedTotalVariation, PixelRange, TotalVariation
from gia_bench.attacks.wrapped import Scaled
from gia_bench.seeding import stream
from gia_bench.values import Reconstruction


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_dlg_finds_at_a_ten_thousandth_of_the_gradient_what_it_finds_at_one(scale: float) -> None:
    """L-BFGS rests where slopes are below 1e-7: a trained model's small gradients must be scaled up."""
    p = problem(3, shape=(1, 16, 16), width=12)
    victim = dataclasses.replace(p.victim, loss=lambda scores, y: scale * p.victim.loss(scores, y))
    seen = [dataclasses.replace(o, update={k: scale * t for k, t in o.update.items()}) for o in p.observations]
    attack = dlg(steps=15, distance=Scaled(distance=Euclidean(), factor=scale**-2))
    found = attack.reconstruct_many(seen, victim, seeds=range(3))
    assert sum(float(psnr_db(r.inputs, x)[0]) > 30 for r, x in zip(found, p.images, strict=True)) >= 2


PRIORS = (TotalVariation, PaddedTotalVariation, IsotropicTotalVariation, Norm, PixelRange, RunningStatistics,
          partial(InferredStatistics, first=0.0))  # fmt: skip
FORCES = (partial(Langevin, scale=0.0), partial(GroupConsistency, weight=0.0, start=0))


@pytest.mark.parametrize("make", [*PRIORS, *FORCES], ids=str)
def test_a_part_of_weight_zero_is_no_part(make: object) -> None:
    p = problem(2, batch=3, norm=nn.BatchNorm2d(4), dtype=torch.float64)
    plain = inverting_gradients(steps=3, restarts=2, priors={})
    extra = {"forces": {"own": make()}} if make in FORCES else {"priors": {"own": make(weight=0.0)}}  # type: ignore[operator]
    with_it = dataclasses.replace(plain, **extra)  # type: ignore[arg-type]
    for a, b in zip(
        *(x.reconstruct_many(p.observations, p.victim, seeds=[0, 1]) for x in (plain, with_it)), strict=True
    ):
        torch.testing.assert_close(a.inputs, b.inputs, rtol=1e-9, atol=1e-12)
        assert b.failure is None and a.score == pytest.approx(b.score)


# what Randn draws first for each of four restarts of seed 0
FIRST = [float(torch.randn(64, generator=stream(0, "initial", t), dtype=torch.float64)[0]) for t in range(4)]


@dataclasses.dataclass(frozen=True)
class BreaksExcept:
    alive: tuple[int, ...]  # every other restart begins, and stays, as NaN

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        guess = torch.randn(tuple(shape), generator=generator, dtype=dtype)
        return guess if float(guess.flatten()[0]) in {FIRST[t] for t in self.alive} else guess * torch.nan


def test_of_restarts_that_break_none_is_returned_and_the_best_of_the_others_is() -> None:
    p, attack = problem(1, dtype=torch.float64), inverting_gradients(steps=10, restarts=4, priors={})

    def found(*alive: int) -> Reconstruction:
        return dataclasses.replace(attack, initial=BreaksExcept(alive)).reconstruct(p.observations[0], p.victim, seed=0)

    alone = [found(t) for t in range(4)]
    for alive in ((0, 1), (1, 3), (2, 3), (1, 2, 3)):
        best, many = min((alone[t] for t in alive), key=lambda r: r.score), found(*alive)
        assert many.failure is None and many.score == pytest.approx(best.score)
        torch.testing.assert_close(many.inputs, best.inputs)


def test_labels_that_are_searched_are_those_of_the_restart_that_is_returned() -> None:
    """The search stands still, so that every restart's labels are its first guess of them."""
    p, owns = problem(1, classes=7, dtype=torch.float64), []
    for t in range(4):
        still = dlg(steps=1, restarts=4, optimizer=Adam(lr=1e-20), initial=BreaksExcept((t,)))
        drawn = torch.randn(1, 7, generator=stream(0, "initial_labels", t), dtype=torch.float64).argmax(-1)
        labels = still.reconstruct(p.observations[0], p.victim, seed=0).labels
        assert labels is not None and torch.equal(labels, drawn)
        owns.append(int(drawn))
    assert len(set(owns)) > 1
