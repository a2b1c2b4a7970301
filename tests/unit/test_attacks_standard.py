"""The ensemble: chosen by what the attacker sees, and bounded by what the truth would have chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from attack_problems import Memory, problem
from torch import Tensor, nn

from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.attacks.compensating import Compensating
from gia_bench.attacks.distances import Cosine
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.oblivious import Oblivious
from gia_bench.attacks.standard import Standard
from gia_bench.attacks.wrapped import Layers
from gia_bench.defenses.dgp import DGP
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.metrics import Metrics, evaluate
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Observation, Reconstruction, Truth, Update

P = problem(3, batch=2)
PLAIN = Metrics(lpips=None)


@final
@dataclass(frozen=True, kw_only=True)
class Says(Attack):
    """Gives what it was told to give, [V, B, C, H, W]."""

    images: Tensor
    labels: Tensor | None = None
    asks: Knowledge = Knowledge.NONE
    wants: Power = Power.NONE
    fails: bool = False
    most: int | None = None

    @property
    def requires(self) -> Knowledge:
        return self.asks

    @property
    def needs(self) -> Power:
        return self.wants

    @property
    def max_examples(self) -> int | None:
        return self.most

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        labels = P.labels if self.labels is None else self.labels
        why = "it diverged" if self.fails else None
        return [
            Reconstruction(inputs=x, labels=y, score=-1.0, failure=why)
            for x, y in zip(self.images, labels, strict=True)
        ]


def says(images: Tensor, **more: Any) -> Says:
    return Says(images=images, **more)


def _halved(update: Update) -> Update:
    return {k: torch.where(u.abs() > u.abs().median(), u, 0.0) for k, u in update.items()}


NOISE = torch.rand(P.images.shape, generator=torch.Generator().manual_seed(1))


def test_the_reconstruction_that_explains_the_update_wins_victim_by_victim_whatever_its_own_score() -> None:
    mixed = torch.where(torch.tensor([True, False, False]).view(3, 1, 1, 1, 1), P.images, NOISE)
    other = torch.where(torch.tensor([False, True, False]).view(3, 1, 1, 1, 1), P.images, NOISE)
    found = Standard(members={"a": says(mixed), "b": says(other)}).reconstruct_many(
        P.observations, P.victim, seeds=[0, 1, 2]
    )
    assert torch.equal(found[0].inputs, P.images[0])
    assert torch.equal(found[1].inputs, P.images[1])
    assert max(found[0].score, found[1].score) < found[2].score
    assert set(found[0].alternatives) == {"a", "b"}


def test_the_oracle_bound_is_the_best_candidate_of_every_image_and_metric() -> None:
    # the ensemble chooses whole updates, the oracle image by image
    first, second = P.images.clone(), P.images.clone()
    first[:, 0], second[:, 1] = NOISE[:, 0], NOISE[:, 1]
    [rebuilt, *_] = Standard(members={"a": says(first), "b": says(second)}).reconstruct_many(
        P.observations, P.victim, seeds=[0, 1, 2]
    )
    scores = evaluate(rebuilt, Truth(P.images[0], P.labels[0]), Metrics(names=["psnr_db", "mse"], lpips=None))
    assert scores.of("oracle_psnr_db") == [100, 100]
    assert scores.of("oracle_mse") == [0, 0]
    assert sorted(x == 100 for x in scores.of("psnr_db")) == [False, True]


def test_without_alternatives_there_is_no_oracle_bound() -> None:
    alone = Reconstruction(inputs=P.images[0], labels=None, score=0.0)
    metrics = {v.metric for v in evaluate(alone, Truth(P.images[0], P.labels[0]), PLAIN).values}
    assert not metrics & {"oracle_psnr_db", "oracle_mse", "oracle_ssim"}


def test_members_that_cannot_attack_here_are_left_out_and_a_failed_one_never_wins() -> None:
    members = {
        "sees labels": says(P.images, asks=Knowledge.LABELS),
        "sees the defense": says(P.images, asks=Knowledge.DEFENSE),
        "one example": says(P.images, most=1),
        "fails": says(P.images, fails=True),
        "plays": says(NOISE),
    }
    [rebuilt, *_] = Standard(members=members).reconstruct_many(P.observations, P.victim, seeds=[0, 1, 2])
    assert set(rebuilt.alternatives) == {"fails", "plays"}
    assert torch.equal(rebuilt.inputs, NOISE[0])
    assert rebuilt.failure is None


@pytest.mark.parametrize("asks", [Knowledge.BUFFERS, Knowledge.SHARED])
def test_a_member_goes_without_statistics_and_announcements_that_are_not_shown(asks: Knowledge) -> None:
    q = problem(3, batch=2, norm=nn.BatchNorm2d(4))
    standard = Standard(members={"asks": says(P.images, asks=asks), "plays": says(NOISE)})
    hidden = [dataclasses.replace(o, buffers={}, shared={}) for o in q.observations]
    [rebuilt, *_] = standard.reconstruct_many(hidden, q.victim, seeds=[0, 1, 2])
    assert set(rebuilt.alternatives) == {"plays"}
    shown = [dataclasses.replace(o, shared={"risk": torch.ones(1)}) for o in q.observations]
    [rebuilt, *_] = standard.reconstruct_many(shown, q.victim, seeds=[0, 1, 2])
    assert set(rebuilt.alternatives) == {"asks", "plays"}


def test_no_member_left_names_all_reasons() -> None:
    alone = Standard(members={"a": says(NOISE, asks=Knowledge.LABELS), "b": says(NOISE, most=1)})
    with pytest.raises(IncompatibleError, match=r"a: it needs to see labels; b: it takes at most 1 example"):
        alone.reconstruct_many(P.observations, P.victim, seeds=[0, 1, 2])


def test_a_malicious_member_and_an_empty_list_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"attack=\[standard,rob\]"):
        Standard(members={"rob": says(NOISE, wants=Power.CHANGE_MODEL)})
    with pytest.raises(ConfigError, match="at least one"):
        Standard(members={})


def test_an_oblivious_attacker_does_what_one_does_who_never_knew() -> None:
    attack = inverting_gradients(steps=3)
    pruned = [dataclasses.replace(o, update=_halved(o.update)) for o in P.observations]
    informed = [dataclasses.replace(o, defense=DGP(k1=0.1, k2=0.5)) for o in pruned]
    blind = Oblivious(attack=attack).reconstruct_many(informed, P.victim, seeds=[0, 1, 2])
    plain = attack.reconstruct_many(pruned, P.victim, seeds=[0, 1, 2])
    adaptive = attack.reconstruct_many(informed, P.victim, seeds=[0, 1, 2])
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(blind, plain, strict=True))
    assert not all(torch.equal(a.inputs, b.inputs) for a, b in zip(blind, adaptive, strict=True))
    assert Knowledge.DEFENSE in Oblivious(attack=attack).requires


def test_members_with_equal_settings_never_share_a_state() -> None:
    inner = inverting_gradients(steps=5, labels="known", snapshot_every=1)
    plain = P.observations[0]
    defense = DGP(k1=0.1, k2=0.5)
    seen = dataclasses.replace(plain, update=_halved(plain.update), defense=defense, labels=P.labels[0])
    ensemble = Standard(members={"knowing": inner, "oblivious": Oblivious(attack=inner)})
    [once] = ensemble.reconstruct_many([seen], P.victim, seeds=[0])
    [kept] = ensemble.reconstruct_many([seen], P.victim, seeds=[0], snapshots=Memory())
    assert not torch.equal(once.alternatives["knowing"].inputs, once.alternatives["oblivious"].inputs)
    for name, one in once.alternatives.items():
        assert torch.equal(one.inputs, kept.alternatives[name].inputs)


def test_wrappers_ask_for_the_earlier_rounds_that_the_inner_attack_wants() -> None:
    one = inverting_gradients(steps=1)
    joint = dataclasses.replace(one, rounds="joint")
    assert Oblivious(attack=joint).remembers
    assert Compensating(attack=joint).remembers
    assert Standard(members={"one": one, "joint": joint}).remembers
    assert not Standard(members={"one": one}).remembers


def test_a_member_that_finds_nothing_to_compare_is_left_out() -> None:
    muted = inverting_gradients(steps=1, labels="known", distance=Layers(distance=Cosine(), layers="all_conv"))
    seen = dataclasses.replace(P.observations[0], labels=P.labels[0])
    head = dataclasses.replace(seen, update=dict(list(seen.update.items())[-2:]))
    [found] = Standard(members={"muted": muted, "says": says(P.images[:1], labels=P.labels[:1])}).reconstruct_many(
        [head], P.victim, seeds=[0]
    )
    assert list(found.alternatives or {}) == ["says"]
    with pytest.raises(IncompatibleError, match=r"no member .* muted: layers=all_conv selects none"):
        Standard(members={"muted": muted}).reconstruct_many([head], P.victim, seeds=[0])
