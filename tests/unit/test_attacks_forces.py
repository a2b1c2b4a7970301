"""What moves the pixels beside the loss: noise by name, and restarts that are drawn together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_problems import Memory, double_backward_loss, problem
from torch import Tensor

from gia_bench.attacks.forces import Course, GroupConsistency, Langevin
from gia_bench.attacks.gradinversion import gradinversion
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.optimizers import Adam, Moment
from gia_bench.attacks.schedules import Constant

FORCES = {"langevin": Langevin(scale=0.5), "group": GroupConsistency(weight=1.0, start=3)}


def course(step: int = 0, lr: float = 0.1, seeds: tuple[int, ...] = (5, 6)) -> Course:
    return Course(Moment(step, 100, 1.0), lr, seeds)


def pixels(victims: int = 2, restarts: int = 3) -> Tensor:
    return torch.randn(victims, restarts, 2, 1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_noise_is_named_by_victim_restart_and_step_and_scales_with_the_learning_rate() -> None:
    noise = Langevin(scale=0.2)
    first = noise(pixels(), course())
    assert torch.equal(first, noise(pixels(), course()))
    assert len({float(first[v, t].flatten()[0]) for v in range(2) for t in range(3)}) == 6
    assert not torch.equal(first, noise(pixels(), course(step=1)))
    assert torch.equal(first[:1, :2], noise(pixels(1, 2), course(seeds=(5,))))
    torch.testing.assert_close(noise(pixels(), course(lr=0.3)), 3 * first)
    assert (first / 0.02).std().item() == pytest.approx(1, abs=0.15)


def test_the_pull_is_the_gradient_of_the_distance_to_a_mean_that_stands_still() -> None:
    x = pixels().requires_grad_()
    mean = x.detach().mean(1, keepdim=True)
    penalty = sum(0.3 * (x - mean)[v, t].norm() / 24 for v in range(2) for t in range(3))
    assert isinstance(penalty, Tensor)
    expected = torch.autograd.grad(penalty, x)[0]
    pull = GroupConsistency(weight=0.3, start=0)
    torch.testing.assert_close(pull(x.detach(), course()), expected)


def test_the_pull_begins_at_its_step_and_a_lone_restart_is_never_pulled() -> None:
    late = GroupConsistency(weight=1.0, start=7)
    assert late(pixels(), course(step=6)).abs().sum() == 0
    assert late(pixels(), course(step=7)).abs().sum() > 0
    assert late(pixels(restarts=1), course(step=7)).abs().sum() == 0


def test_restarts_that_are_pulled_end_closer_together_and_their_score_is_their_own_loss() -> None:
    p = problem(2, dtype=torch.float64)
    plain = inverting_gradients(steps=30, restarts=3, optimizer=Adam(lr=0.05), schedule=Constant(), boxed=False)
    plain = dataclasses.replace(plain, priors={})
    pulled = dataclasses.replace(plain, forces={"group": GroupConsistency(weight=1e4, start=0)})
    spreads, runs = [], []
    for attack in (plain, pulled):
        memory = Memory()
        runs.append(attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1], snapshots=memory))
        (state,) = memory.kept.values()
        spreads.append(float((state["variables/pixels"] - state["variables/pixels"].mean(1, keepdim=True)).norm()))
    assert spreads[1] < 0.5 * spreads[0]
    for r, o in zip(runs[1], p.observations, strict=True):
        assert r.labels is not None
        assert r.score == pytest.approx(double_backward_loss(p.victim, o, r.inputs, r.labels).item(), abs=1e-9)


def test_forces_leave_victims_alone_and_survive_a_kill_bit_for_bit() -> None:
    p = problem(3, dtype=torch.float64)
    attack = inverting_gradients(steps=8, restarts=2, snapshot_every=2, boxed=False)
    attack = dataclasses.replace(attack, forces=FORCES)
    together = attack.reconstruct_many(p.observations, p.victim, seeds=[3, 1, 4])
    chunked = dataclasses.replace(attack, max_batch=1).reconstruct_many(p.observations, p.victim, seeds=[3, 1, 4])
    alone = attack.reconstruct(p.observations[2], p.victim, seed=4)
    torch.testing.assert_close(together[2].inputs, alone.inputs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(together[0].inputs, chunked[0].inputs, rtol=1e-6, atol=1e-8)
    memory = Memory(saves_to_live=2)
    with pytest.raises(KeyboardInterrupt):
        attack.reconstruct_many(p.observations, p.victim, seeds=[3, 1, 4], snapshots=memory)
    memory.saves_to_live = None
    resumed = attack.reconstruct_many(p.observations, p.victim, seeds=[3, 1, 4], snapshots=memory)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(resumed, together, strict=True))
    without = dataclasses.replace(attack, forces={}).reconstruct(p.observations[2], p.victim, seed=4)
    assert not torch.equal(without.inputs, alone.inputs)


def test_gradinversion_runs_its_restarts_in_lock_step_on_a_batch_of_distinct_labels() -> None:
    p = problem(1, batch=2, dtype=torch.float64)
    attack = gradinversion(steps=6)
    assert attack.restarts == 4
    found = attack.reconstruct(p.observations[0], p.victim)
    assert found.failure is None
    assert found.labels is not None and len(set(found.labels.tolist())) == 2
