"""What holds for every pruning that conf/pruning offers, around any defense."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from pruning_problems import (
    DEFENSES,
    FEDAVG,
    FEDSGD,
    NAMES,
    SIZES,
    SOON,
    announced,
    federation,
    images,
    local_for,
    method,
    off,
    victim,
)
from torch import Tensor

from gia_bench.conf_path import CONF
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import BatchLoss, Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import IncompatibleError, WireError
from gia_bench.federated.announcements import Announcements
from gia_bench.federated.execution import Loop, Vmap
from gia_bench.models.functional import Victim
from gia_bench.pruning.erk import erk_counts
from gia_bench.pruning.none import NoPruning
from gia_bench.pruning.pruned import OWN, Pruned, with_pruning
from gia_bench.pruning.random_mask import RandomMask
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import DENSE, EVIDENCE, SPARSE, Kept, places, shared_bytes
from gia_bench.wire.aligned import MASK


def test_all_methods_are_offered() -> None:
    assert {"none", "random", "snip", "snip_first_round", "synflow", "grasp", "feddst", "prunefl"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_spells_every_field_of_its_method_and_nothing_else(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"pruning={name}"]).pruning
    assert set(config) == {"_target_", *(f.name for f in dataclasses.fields(get_class(config._target_)))}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("none", "prunefl_cifar10", "prunefl_femnist")])
def test_pruned_weights_are_exactly_zero_after_every_round_and_nothing_off_the_mask_is_sent(name: str) -> None:
    made = Pruned(inner=NoDefense(), method=method(name, *SOON.get(name, [])))
    before: dict[str, Tensor] = {}
    for r, (played, params, masks) in enumerate(federation(made, local_for(name))):
        assert set(masks) == {"0.weight", "3.weight", "5.weight"}
        assert off(params, masks) == 0
        transcript = played.transcript
        assert transcript is not None
        for client, update in transcript.updates.items():
            assert set(update) == set(params)
            assert off(update, announced(transcript.shared)) == 0
            assert set(transcript.evidence[client]) <= {EVIDENCE + k for k in params}
        if r and not before.keys() ^ announced(transcript.shared).keys():
            assert all(torch.equal(before[k], m) for k, m in announced(transcript.shared).items())
        before = {k: m for k, m in masks.items() if not m.all()}
    if name != "prunefl":
        assert sum(int(m.sum()) for m in masks.values()) == pytest.approx(0.2 * (36 + 1024 + 48), abs=1.5)


class _Spy(Defense):
    """Keeps the weights of every local step."""

    def __init__(self) -> None:
        self.seen: list[Params] = []

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        self.seen.append(params)
        return super().gradient(loss, params, batch, noise, step)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        return update, state


def test_pruned_weights_are_exactly_zero_in_every_local_step() -> None:
    spy = _Spy()
    [(_, _, masks)] = federation(Pruned(inner=spy, method=RandomMask()), FEDAVG, Loop(), rounds=1)
    assert len(spy.seen) == sum(-(-n // 3) for n in SIZES)
    assert not all(torch.equal(spy.seen[0]["3.weight"], seen["3.weight"]) for seen in spy.seen)
    for weights in spy.seen:
        assert off(weights, masks) == 0


@pytest.mark.parametrize("inner", DEFENSES)
@pytest.mark.parametrize("name", ["random", "snip_first_round", "feddst", "prunefl"])
def test_loop_and_vmap_agree_and_every_defense_stays_on_the_mask(name: str, inner: str) -> None:
    made = Pruned(inner=DEFENSES[inner], method=method(name, *SOON.get(name, [])))
    # the server's momentum apart, so that a tie broken otherwise in one round does not run away
    runs = [list(federation(made, FEDAVG, e, rounds=3, momentum=0.0)) for e in (Loop(), Vmap(chunk_size=2))]
    for alone, mapped in zip(*runs, strict=True):
        assert alone.round.uplink_bytes.keys() == mapped.round.uplink_bytes.keys()
        if inner == "none":
            torch.testing.assert_close(alone.round.aggregate, mapped.round.aggregate, rtol=1e-4, atol=1e-5)
            assert alone.round.uplink_bytes == mapped.round.uplink_bytes
        for one in (alone, mapped):
            assert one.round.transcript is not None
            assert off(one.params, one.masks) == 0
            for update in one.round.transcript.updates.values():
                assert off(update, announced(one.round.shared)) == 0


def test_density_one_is_no_pruning_bit_for_bit() -> None:
    for inner in (NoDefense(), DGP(), GaussianNoise(scale=0.1)):
        for local in (FEDSGD, FEDAVG):
            plain = list(federation(inner, local))
            whole = list(federation(Pruned(inner=inner, method=RandomMask(density=1.0)), local))
            for one, other in zip(plain, whole, strict=True):
                assert all(torch.equal(one.params[k], other.params[k]) for k in one.params)
                assert one.round.uplink_bytes == other.round.uplink_bytes
                assert one.round.model_bytes == other.round.model_bytes
                assert not other.round.shared


@pytest.mark.parametrize("density", [0.5, 0.2, 0.05])
def test_bytes_are_those_of_the_kept_weights(density: float) -> None:
    [(played, params, masks)] = federation(
        Pruned(inner=NoDefense(), method=RandomMask(density=density)), FEDSGD, rounds=1
    )
    kept = sum(int(m.sum()) for m in masks.values()) + sum(p.numel() for k, p in params.items() if k not in masks)
    assert set(played.uplink_bytes.values()) == {4 * kept} == {played.model_bytes} == {played.aggregate_bytes}
    assert shared_bytes(played.shared) == sum(-(-m.numel() // 8) for m in masks.values())


def test_feddst_keeps_its_density_and_every_client_sends_a_bit_per_weight_when_it_readjusts() -> None:
    made = Pruned(inner=NoDefense(), method=method("feddst", *SOON["feddst"]))
    start: dict[str, Tensor] = {}
    moved = 0
    for r, (played, params, masks) in enumerate(federation(made, FEDAVG, rounds=8)):
        counts = erk_counts({k: tuple(m.shape) for k, m in masks.items()}, 0.2)
        assert {k: int(m.sum()) for k, m in masks.items()} == counts
        assert played.transcript is not None
        for client, evidence in played.transcript.evidence.items():
            assert set(evidence) == ({EVIDENCE + k for k in masks} if r % 2 else set())
            if evidence:
                own = {k: evidence[EVIDENCE + k] for k in masks}
                assert {k: int(m.sum()) for k, m in own.items()} == counts
                both = sum(int((own[k] & start[k]).sum()) for k in masks)
                biases = sum(p.numel() for k, p in params.items() if k not in masks)
                bitmaps = sum(-(-m.numel() // 8) for m in masks.values())
                assert played.uplink_bytes[client] == 4 * (both + biases) + bitmaps
                assert off(played.transcript.updates[client], own) == 0
        moved += sum(int((start[k] != m).sum()) for k, m in masks.items()) if start else 0
        start = masks
    assert moved > 0


def test_prunefls_gradients_cost_a_model_and_come_once_an_interval() -> None:
    made = Pruned(inner=NoDefense(), method=method("prunefl", *SOON["prunefl"]))
    rounds = list(federation(made, FEDSGD, rounds=4))
    dense = 4 * sum(p.numel() for p in rounds[0].params.values())
    sizes = [set(p.round.uplink_bytes.values()) for p in rounds]
    assert sizes[0] == {dense} and sizes[1] == {2 * dense}
    kept = 4 * (sum(int(m.sum()) for m in rounds[1].masks.values()) + 4 + 16 + 3)
    assert kept < dense and sizes[2] == {kept} and sizes[3] == {kept + dense}
    states = rounds[0].round.states[0]
    assert any(float(v.sum()) > 0 for v in states.values()) and all(k.startswith(OWN) for k in states)
    assert all(float(v.sum()) == 0 for v in rounds[1].round.states[0].values())


def test_evidence_stays_out_of_what_an_attacker_is_shown() -> None:
    made = Pruned(inner=NoDefense(), method=method("prunefl", *SOON["prunefl"]))
    transcript = list(federation(made, FEDSGD, rounds=2))[1].round.transcript
    assert transcript is not None and transcript.evidence[0]
    assert set(transcript.updates[0]) == set(transcript.aggregate) == set(transcript.params)


@pytest.mark.parametrize("codec", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_the_codec_gives_back_the_update_and_its_evidence_bit_for_bit(codec: Any) -> None:
    g = stream(0, "wire")
    mask, own = torch.rand(5, 7, generator=g) < 0.5, torch.rand(5, 7, generator=g) < 0.5
    sent = {
        "a": torch.where(mask & own, torch.randn(5, 7, generator=g), 0), "b": torch.randn(4, generator=g),
        "none": torch.zeros(3, 2), EVIDENCE + "a": own, EVIDENCE + "b": torch.randn(4, generator=g),
    }  # fmt: skip
    shared = {MASK + "a": mask, MASK + "none": torch.zeros(3, 2, dtype=torch.bool)}
    kept = Kept(codec)
    payload = kept.encode(sent, shared, 2)
    decoded = kept.decode(payload, {k: torch.ones_like(v) for k, v in sent.items()}, shared)
    assert all(torch.equal(decoded[k], v) and decoded[k].dtype == v.dtype for k, v in sent.items())
    assert {k: v.tolist() for k, v in places(kept, sent, shared).items()} == {
        "a": mask.tolist(), "none": [[False, False]] * 3,
    }  # fmt: skip
    if codec is DENSE:
        assert payload.num_bytes == 5 + 16 + 4 * int((mask & own).sum()) + 16
    with pytest.raises(WireError, match="off the mask in 'a'"):
        kept.encode(sent | {"a": torch.ones(5, 7)}, shared, 2)
    with pytest.raises(WireError, match="not one of kept entries"):
        kept.decode(DENSE.encode({"b": sent["b"]}, {}, 2), {"b": sent["b"]}, {})


def test_an_announcement_that_stays_the_same_is_downloaded_once_by_each_client() -> None:
    told = Announcements()
    mask, other = {"mask.a": torch.ones(80, dtype=torch.bool)}, {"mask.a": torch.zeros(80, dtype=torch.bool)}
    assert told.tell(mask, (0, 1)) == 10
    assert told.tell({"mask.a": mask["mask.a"].clone()}, (0, 1)) == 0
    assert told.tell(mask, (1, 2)) == 5
    again = Announcements.of(told.state())
    assert again.tell(mask, (0, 2)) == 0
    assert again.tell(other, (0, 2)) == 10
    assert again.tell({}, (0,)) == 0
    assert again.tell(other, (0,)) == 10


def test_an_attacker_who_knows_the_defense_puts_the_mask_on_its_dummy() -> None:
    defense = Pruned(inner=TopK(keep=0.5), method=RandomMask()).calibrate(victim(), images("public", 40))
    params, _ = victim().initial()
    masks = {k.removeprefix(OWN + MASK): v for k, v in defense.init_server(params).items()}
    seen = {k: torch.where(masks[k], v, 0) if k in masks else v for k, v in params.items()}
    dummy = {k: torch.ones_like(v) for k, v in params.items()}
    for shared in ({MASK + k: m for k, m in masks.items()}, {}):
        stand_in = defense.surrogate(dummy, Observation(params=params, update=seen, shared=shared, defense=defense))
        assert off(stand_in, masks) == 0 and float(stand_in["3.weight"].sum()) > 0


def test_adgp_is_refused_and_no_pruning_leaves_a_defense_alone() -> None:
    for inner in (ADGP(), Chain(stages={"first": ADGP()})):
        with pytest.raises(IncompatibleError, match="pruning=none"):
            Pruned(inner=inner, method=RandomMask())
    inner = DGP()
    assert with_pruning(inner, NoPruning()) is inner


def test_pruning_leaves_the_published_model_as_it_was() -> None:
    model = victim().module.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("snip", "synflow", "grasp"):
        made = Pruned(inner=NoDefense(), method=method(name))
        made.calibrate(Victim(module=model, input_shape=(1, 6, 6), num_classes=3), images("public", 40))
        assert model.training and all(m.training for m in model.modules())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
