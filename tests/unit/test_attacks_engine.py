"""What the engine promises: best iterates with their own loss, victims that do not touch each other, and resuming."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from attack_problems import Memory, double_backward_loss, problem
from torch import Tensor

from gia_bench.attacks import optimize, telling
from gia_bench.attacks.distances import Euclidean
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.idlg import idlg
from gia_bench.attacks.initial import Zeros
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam, Moment
from gia_bench.attacks.schedules import Constant
from gia_bench.attacks.wrapped import Scaled
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.values import Observation, Reconstruction, Update


def assert_same(found: list[Reconstruction], expected: list[Reconstruction], rtol: float = 0, atol: float = 0) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.inputs, b.inputs, rtol=rtol, atol=atol)
        assert a.score == pytest.approx(b.score, rel=max(rtol, 1e-12))
        assert (
            torch.equal(a.labels, b.labels) if a.labels is not None and b.labels is not None else a.labels is b.labels
        )
        assert a.failure == b.failure


@pytest.mark.parametrize("normalised", [False, True])
def test_the_score_is_the_loss_of_the_returned_inputs(normalised: bool) -> None:
    """With steps so large that the loss jumps, so that the best iterate is not the last one."""
    p = problem(3, normalised=normalised, dtype=torch.float64)
    attack = inverting_gradients(steps=25, optimizer=Adam(lr=5), schedule=Constant(), boxed=False, priors={})
    for v, r in enumerate(attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])):
        assert r.labels is not None
        loss = double_backward_loss(p.victim, p.observations[v], r.inputs, r.labels)
        assert r.score == pytest.approx(loss.item(), abs=1e-9)


def test_the_result_of_the_last_step_is_looked_at_too() -> None:
    p = problem(1)
    attack = inverting_gradients(steps=1, optimizer=Adam(lr=0.01), boxed=False)
    before = double_backward_loss(p.victim, p.observations[0], torch.randn(1, 1, 8, 8), p.labels[0])
    first = attack.reconstruct(p.observations[0], p.victim, seed=5)
    start = dataclasses.replace(attack, optimizer=Adam(lr=1e-30)).reconstruct(p.observations[0], p.victim, seed=5)
    assert before.isfinite()
    assert first.score < start.score


@pytest.mark.parametrize("attack", [inverting_gradients(steps=30), dlg(steps=2), idlg(steps=2)])
def test_a_victim_has_the_same_result_alone_and_in_any_batch_or_chunk(attack: GradientMatching) -> None:
    p = problem(4, dtype=torch.float64)
    together = attack.reconstruct_many(p.observations, p.victim, seeds=[3, 1, 4, 1])
    alone = [attack.reconstruct(o, p.victim, seed=s) for o, s in zip(p.observations, [3, 1, 4, 1], strict=True)]
    assert_same(together, alone, rtol=1e-5, atol=1e-7)
    chunked = dataclasses.replace(attack, max_batch=3)
    assert_same(chunked.reconstruct_many(p.observations, p.victim, seeds=[3, 1, 4, 1]), alone, rtol=1e-5, atol=1e-7)


def test_observations_of_other_rounds_and_batch_sizes_are_attacked_in_one_call_and_keep_their_order() -> None:
    small, large = problem(2, dtype=torch.float64), problem(2, batch=3, dtype=torch.float64)
    mixed = [small.observations[0], large.observations[0], small.observations[1], large.observations[1]]
    attack = inverting_gradients(steps=5)
    found = attack.reconstruct_many(mixed, small.victim, seeds=[0, 1, 2, 3])
    assert [len(r.inputs) for r in found] == [1, 3, 1, 3]
    alone = [attack.reconstruct(o, small.victim, seed=s) for s, o in enumerate(mixed)]
    assert_same(found, alone, rtol=1e-6, atol=1e-8)


def test_several_restarts_return_the_best_of_separate_runs() -> None:
    p = problem(3, dtype=torch.float64)
    attack = inverting_gradients(steps=20)
    many = dataclasses.replace(attack, restarts=4).reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
    few = dataclasses.replace(attack, restarts=2).reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
    one = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
    for more, less, single in zip(many, few, one, strict=True):
        assert more.score <= less.score + 1e-9
        assert less.score <= single.score + 1e-9
    assert any(more.score < single.score for more, single in zip(many, one, strict=True))


def test_another_seed_is_another_start_and_the_same_seed_the_same_result() -> None:
    p = problem(1)
    attack = inverting_gradients(steps=3)
    runs = [attack.reconstruct(p.observations[0], p.victim, seed=s) for s in (0, 0, 1)]
    assert_same(runs[:1], runs[1:2])
    assert not torch.equal(runs[0].inputs, runs[2].inputs)


def test_an_update_with_nan_fails_alone_and_says_where() -> None:
    p = problem(3)
    broken = dict(p.observations[1].update)
    broken["0.bias"] = torch.full_like(broken["0.bias"], torch.nan)
    mixed = [p.observations[0], dataclasses.replace(p.observations[1], update=broken), p.observations[2]]
    for attack in (inverting_gradients(steps=10, restarts=2), dlg(steps=2)):
        found = attack.reconstruct_many(mixed, p.victim, seeds=[0, 1, 2])
        assert [r.failure is None for r in found] == [True, False, True]
        assert found[1].failure is not None
        assert "NaN or infinity in 0.bias" in found[1].failure
        assert all(r.inputs.isfinite().all() for r in found)
        fine = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2])
        assert_same([found[0], found[2]], [fine[0], fine[2]], rtol=1e-3, atol=1e-3)


def test_a_model_that_is_nan_itself_is_a_failure_of_every_restart() -> None:
    p = problem(1)
    nan = {k: v * torch.nan for k, v in p.observations[0].params.items()}
    broken = dataclasses.replace(p.observations[0], params=nan)
    found = inverting_gradients(steps=2, restarts=3).reconstruct(broken, p.victim)
    assert found.failure == "the loss was never finite in any of 3 restarts"
    assert found.score == torch.inf


def test_a_restart_that_diverges_is_never_the_best() -> None:
    """From the third step on everything is NaN; the best of the iterates before is what remains."""

    def break_down(gradient: Tensor, moment: Moment) -> Tensor:
        return gradient if moment.step < 2 else gradient * torch.nan

    p = problem(1)
    attack = inverting_gradients(steps=5, optimizer=Adam(transform=break_down), schedule=Constant(), priors={})
    found = attack.reconstruct(p.observations[0], p.victim, seed=0)
    assert found.failure is None
    assert found.inputs.isfinite().all()
    assert found.score < 2
    assert found.diverged == 1
    sound = inverting_gradients(steps=2, optimizer=Adam(), schedule=Constant(), priors={})
    before = sound.reconstruct(p.observations[0], p.victim, seed=0)
    assert (before.score, before.diverged) == (found.score, 0)


@pytest.mark.parametrize(
    "attack",
    [
        inverting_gradients(steps=12, snapshot_every=2, restarts=2),
        dlg(steps=6, snapshot_every=1),
        idlg(steps=6, snapshot_every=1),
    ],
)
@pytest.mark.parametrize("saves", [1, 3])
def test_a_killed_attack_goes_on_bit_for_bit(attack: GradientMatching, saves: int) -> None:
    p = problem(2)
    expected = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    memory = Memory(saves_to_live=saves)
    with pytest.raises(KeyboardInterrupt):
        attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1], snapshots=memory)
    saved = [state["step"] for state in memory.kept.values()]
    assert saved[0] > 0
    memory.saves_to_live = None
    assert_same(attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1], snapshots=memory), expected)
    assert len(memory.kept) == 1, "a second key means that the first state was not picked up"


def test_a_long_search_says_how_far_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(2)
    attack = inverting_gradients(steps=9, snapshot_every=4)
    with caplog.at_level(logging.INFO, logger=optimize.__name__):
        attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
        assert not caplog.records, "a short one says nothing"
        monkeypatch.setattr(telling, "TELL_EVERY", 0.0)
        attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in said] == ["step 4 of 9", "step 8 of 9", "step 9 of 9"]
    assert said[0].endswith("in the median, 0 of 2 candidates are at rest")


@pytest.mark.parametrize("stop_below", [None, 1e-6])
def test_a_search_that_never_left_where_it_began_is_told_and_any_other_is_not(
    caplog: pytest.LogCaptureFixture, stop_below: float | None
) -> None:
    """A distance times 1e-12 has slopes below what L-BFGS takes for flat, and is itself below where iDLG stops."""
    p, attack = problem(2), dataclasses.replace(idlg(steps=2), stop_below=stop_below)
    attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    tiny = Scaled(distance=Euclidean(), factor=1e-12)
    dataclasses.replace(attack, distance=tiny).reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    [told] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert told.startswith("2 of 2 candidates never left where they began") and "tolerance_grad" in told


def test_the_state_of_other_settings_or_victims_is_never_picked_up() -> None:
    p, memory = problem(2), Memory()
    for attack in (inverting_gradients(steps=2), inverting_gradients(steps=3), dlg(steps=2)):
        for seed in (0, 1):
            attack.reconstruct_many([p.observations[seed]], p.victim, seeds=[seed], snapshots=memory)
    assert len(memory.kept) == 6
    assert all("0x" not in key for key in memory.kept)


def test_a_candidate_below_the_stopping_loss_rests_and_the_others_go_on() -> None:
    p = problem(4, dtype=torch.float64)
    attack = idlg(steps=40, stop_below=1e-3)
    endless = dataclasses.replace(attack, stop_below=None)
    stopped = attack.reconstruct_many(p.observations, p.victim, seeds=range(4))
    ended = endless.reconstruct_many(p.observations, p.victim, seeds=range(4))
    assert any(e.score < 1e-3 for e in ended)
    for s, e in zip(stopped, ended, strict=True):
        assert e.score <= s.score
        assert s.score < 1e-3 or s.score == pytest.approx(e.score, rel=1e-3)


def test_boxed_pixels_stay_images_and_the_search_runs_in_normalised_units() -> None:
    p = problem(1, normalised=True)
    attack = inverting_gradients(steps=20, optimizer=Adam(lr=0.5))
    inputs = attack.reconstruct(p.observations[0], p.victim, seed=0).inputs
    assert inputs.min() >= -1e-6
    assert inputs.max() <= 1 + 1e-6
    at_zero = inverting_gradients(steps=1, initial=Zeros(), optimizer=Adam(lr=1e-20))
    grey = at_zero.reconstruct(p.observations[0], p.victim).inputs
    torch.testing.assert_close(grey, torch.full_like(grey, 0.4))


def test_a_local_learning_rate_does_not_change_what_euclidean_matching_finds() -> None:
    """One local step sends lr * gradient: the attacker who knows lr is as well off as with the gradient."""
    p = problem(1, dtype=torch.float64)
    o = p.observations[0]
    sent = {k: 0.01 * v for k, v in o.update.items()}
    fedavg = dataclasses.replace(o, update=sent, local=FedAvg(learning_rate=0.01, batch_size=None))
    fedsgd = dataclasses.replace(o, local=FedSGD(batch_size=None))
    attack = inverting_gradients(steps=20, distance=Euclidean(), labels="idlg")
    results = [[attack.reconstruct(seen, p.victim)] for seen in (o, fedsgd, fedavg)]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2], rtol=1e-6, atol=1e-9)


def test_an_attacker_who_knows_the_defense_matches_through_its_surrogate() -> None:
    """Only the last layer is sent, scaled by 3. Knowing that, the matching loss at the truth is zero."""

    class LastLayer:
        def surrogate(self, update: Update, observation: Observation) -> Update:
            kept = {k: (v != 0).to(v.dtype) for k, v in observation.update.items()}
            return {k: 3 * v * kept[k] for k, v in update.items()}

    p = problem(2, dtype=torch.float64)
    sent = [{k: 3 * v if k.startswith("5") else 0 * v for k, v in o.update.items()} for o in p.observations]
    attack = inverting_gradients(steps=60, distance=Euclidean(), labels="idlg", priors={})
    pairs = list(zip(p.observations, sent, strict=True))
    oblivious = [dataclasses.replace(o, update=u) for o, u in pairs]
    adaptive = [dataclasses.replace(o, defense=LastLayer()) for o in oblivious]  # type: ignore[arg-type]
    blind = attack.reconstruct_many(oblivious, p.victim, seeds=[0, 1])
    knowing = attack.reconstruct_many(adaptive, p.victim, seeds=[0, 1])
    assert all(k.score < 0.1 * b.score for k, b in zip(knowing, blind, strict=True))
