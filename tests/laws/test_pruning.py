"""What holds for every pruning that conf/pruning offers, around any defense."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from command import gia_bench
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from torch import Tensor, nn

from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import BatchLoss, Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.precision import HalfPrecision, Int8
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import IncompatibleError, WireError
from gia_bench.federated.announcements import Announcements
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD, LocalWork
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning
from gia_bench.pruning.erk import erk_counts
from gia_bench.pruning.initial import InitialPruning
from gia_bench.pruning.none import NoPruning
from gia_bench.pruning.pruned import OWN, Pruned, with_pruning
from gia_bench.pruning.prunefl import PruneFL
from gia_bench.pruning.random_mask import RandomMask
from gia_bench.pruning.snip import SNIP
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Buffers, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import DENSE, EVIDENCE, SPARSE, Kept, places, shared_bytes
from gia_bench.wire.aligned import MASK

NAMES = sorted(path.stem for path in (CONF / "pruning").glob("*.yaml"))
SOON = {"feddst": ["pruning.interval=2", "pruning.rounds=20"]} | {
    n: ["pruning.interval=2", "pruning.constant=0.01", "pruning.computation=1e-6"] for n in NAMES if "prunefl" in n
}
SIZES = (7, 4, 6)
FEDSGD, FEDAVG = FedSGD(batch_size=4), FedAvg(epochs=1, batch_size=3, momentum=0.9, weight_decay=0.01)
DEFENSES: dict[str, Defense] = {
    "none": NoDefense(), "dgp": DGP(), "top_k": TopK(keep=0.5), "gaussian_noise": GaussianNoise(scale=0.1),
    "dp_sgd": DPSGD(), "half_precision": HalfPrecision(), "int8": Int8(),
    "chain": Chain(stages={"clip": ClipUpdate(), "noise": GaussianNoise(scale=0.1), "top_k": TopK()}),
}  # fmt: skip


def method(name: str, *overrides: str) -> Pruning:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"pruning={name}", *overrides])
        made: Pruning = instantiate(cfg.pruning, _convert_="all")
    return made


def local_for(name: str) -> LocalWork:
    return FEDAVG if name == "feddst" else FEDSGD


def victim() -> Victim:
    with seeded(0, "test model"):
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 16), nn.Tanh(), nn.Linear(16, 3)
        )
    return Victim(module=module, input_shape=(1, 6, 6), num_classes=3)


def images(name: str, count: int) -> InMemory:
    g = stream(0, name)
    return InMemory(torch.rand(count, 1, 6, 6, generator=g), torch.randint(3, (count,), generator=g))


def cohort(local: LocalWork, round_index: int) -> Cohort:
    owned = torch.arange(sum(SIZES)).split(list(SIZES))
    chosen = [local.schedule(n, 0, round_index, c) for c, n in enumerate(SIZES)]
    return Cohort(
        round_index=round_index, clients=(0, 1, 2), source=images("private", sum(SIZES)),
        steps=tuple(tuple(own[p] for p in steps) for own, steps in zip(owned, chosen, strict=True)),
        weights=tuple(local.weight(n, s) for n, s in zip(SIZES, chosen, strict=True)),
    )  # fmt: skip


class Played(NamedTuple):
    """One round; params: the server's after it; masks: those after it."""

    round: Round
    params: Params
    masks: dict[str, Tensor]


def federation(
    defense: Defense, local: LocalWork, executor: Executor | None = None, *, rounds: int = 5, momentum: float = 0.9
) -> Iterator[Played]:
    """Rounds of a server whose optimizer has momentum and weight decay."""
    model = victim()
    defense = defense.calibrate(model, images("public", 40))
    rules = Rules(victim=model, defense=defense, local=local, executor=executor or Vmap(), seed=0)
    params, buffers = model.initial()
    params, state = defense.settle(params, defense.init_server(params))
    optimizer = torch.optim.SGD([params[k] for k in params], lr=0.5, momentum=momentum, weight_decay=0.01)
    states: dict[int, State] = {}
    for r in range(rounds):
        played = play_round(rules, Server(params, buffers, state), states, cohort(local, r), observed=(0, 1, 2))
        for k, p in params.items():
            p.grad = played.aggregate[k]
        optimizer.step()
        settled, state = defense.settle(params, played.server_state)
        for k, p in params.items():
            p.copy_(settled[k])
        states |= played.states
        masks = {k.removeprefix(OWN + MASK): v for k, v in state.items() if k.startswith(OWN + MASK)}
        yield Played(played, {k: v.clone() for k, v in params.items()}, masks)


def off(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> int:
    """How many entries off the masks are not exactly plus zero."""
    return sum(int((tensors[k][~m].view(torch.int32) != 0).sum()) for k, m in masks.items())


def announced(shared: Shared) -> dict[str, Tensor]:
    return {k.removeprefix(MASK): v for k, v in shared.items() if k.startswith(MASK)}


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


def first_round_snip(inner: Defense | None = None, **fields: Any) -> Pruned:
    return Pruned(inner=inner or NoDefense(), method=SNIP(scored_on="first_round", **fields))


@pytest.mark.parametrize("local", [FEDSGD, FEDAVG], ids=["fedsgd", "fedavg"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.05])
def test_snip_of_the_first_round_keeps_the_largest_weight_times_mean_update_and_bytes_fall_from_round_1_on(
    density: float, local: LocalWork
) -> None:
    rounds = list(federation(first_round_snip(density=density), local, rounds=3))
    start, _ = victim().initial()
    dense = 4 * sum(p.numel() for p in start.values())
    first = rounds[0].round
    assert first.transcript is not None and not announced(first.transcript.shared)
    assert set(first.uplink_bytes.values()) == {dense} == {first.model_bytes}
    names = ["0.weight", "3.weight", "5.weight"]
    weights = [7, 4, 6] if local is FEDAVG else [4, 4, 4]
    mean = {
        k: sum(w * u[k].double() for w, u in zip(weights, first.transcript.updates.values(), strict=True))
        / sum(weights)
        for k in names
    }
    scores = np.concatenate([np.abs(start[k].double().numpy() * mean[k].numpy()).ravel() for k in names])
    kept = math.ceil(round(density * scores.size, 6))
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores)[:kept]] = True
    for played, _, masks in rounds:
        assert list(masks) == names
        assert np.array_equal(torch.cat([masks[k].flatten() for k in names]).numpy(), chosen)
        assert played.transcript is not None and not any(played.transcript.evidence.values())
    biases = 4 * sum(p.numel() for k, p in start.items() if k not in names)
    for played, _, masks in rounds[1:]:
        assert set(played.uplink_bytes.values()) == {biases + 4 * kept} == {played.model_bytes}
        assert {k: m.tolist() for k, m in announced(played.shared).items()} == {
            k: m.tolist() for k, m in masks.items() if not m.all()
        }


def test_a_server_that_starts_again_after_the_first_round_has_the_masks_it_had() -> None:
    made = first_round_snip()
    model, public = victim(), images("public", 40)
    one, other = (made.calibrate(model, public) for _ in range(2))
    params, buffers = model.initial()
    params, state = one.settle(params, one.init_server(params))
    rules = Rules(victim=model, defense=one, local=FEDSGD, executor=Vmap(), seed=0)
    played = play_round(rules, Server(params, buffers, state), {}, cohort(FEDSGD, 0))
    params = {k: p - 0.5 * played.aggregate[k] for k, p in params.items()}
    params, state = one.settle(params, played.server_state)
    file = io.BytesIO()
    torch.save((params, state), file)
    file.seek(0)
    loaded = torch.load(file)
    next_rounds = [
        play_round(dataclasses.replace(rules, defense=defense), Server(weights, buffers, held), {}, cohort(FEDSGD, 1))
        for defense, (weights, held) in ((one, (params, state)), (other, loaded))
    ]
    assert set(state) == {OWN + MASK + k for k in ("0.weight", "3.weight", "5.weight")}
    went_on, began_again = (announced(played.shared) for played in next_rounds)
    assert sum(int(m.sum()) for m in went_on.values()) == 222  # of 36 + 1024 + 48
    assert all(torch.equal(began_again[k], m) for k, m in went_on.items()) and off(loaded[0], went_on) == 0
    assert all(torch.equal(next_rounds[1].aggregate[k], v) for k, v in next_rounds[0].aggregate.items())


def test_a_federation_begins_with_the_masks_and_the_weights_of_prunefls_initial_stage() -> None:
    stage = InitialPruning(rounds=20, batches=4, batch_size=8, interval=3, accuracy_factor=0.5)
    chosen = PruneFL(interval=2, constant=0.01, communication=1e-6, initial=stage)
    model, public = victim(), images("public", 40)
    begun = chosen.begin(victim(), public)
    made = Pruned(inner=NoDefense(), method=chosen).calibrate(model, public)
    state = made.init_server(model.initial()[0])
    params, settled = made.settle(model.initial()[0], state)
    assert all(torch.equal(params[k], v) for k, v in begun.params.items()) and off(params, begun.masks) == 0
    assert set(settled) == {OWN + MASK + k for k in begun.masks}
    # the next settling keeps the server's own weights
    moved = {k: p + 1 for k, p in params.items()}
    again, _ = made.settle(moved, settled)
    assert all(
        torch.equal(again[k], torch.where(begun.masks.get(k, torch.tensor(True)), v, 0)) for k, v in moved.items()
    )
    first = next(federation(Pruned(inner=NoDefense(), method=chosen), FEDSGD)).round
    kept = sum(int(m.sum()) for m in begun.masks.values()) + 4 + 16 + 3
    PruneFL().check_public("test")
    chosen.check_public("train")
    assert set(first.uplink_bytes.values()) == {4 * kept} and kept < sum(p.numel() for p in params.values())
    assert first.transcript is not None
    assert all(torch.equal(first.transcript.params[k], v) for k, v in begun.params.items())
    # a malicious server's model is calibrated anew, and nobody trains it
    assert made.calibrate(model, public).settle(model.initial()[0], {})[0].keys() == params.keys()
    assert not [k for k in made.calibrate(model, public).init_server(params) if "trained" in k]


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
    for inner in (ADGP(), Chain(stages={"first": ADGP()}), Chain(stages={"first": Chain(stages={"one": ADGP()})})):
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


RUN = (
    "dataset=digits", "model=mlp", "model.network.hidden=[64]", "fl=fedavg",
    "fl.rounds=8", "fl.local.epochs=null", "fl.local.steps=2",
    "fl.eval_every=3", "fl.clients_per_round=3", "partition.num_clients=5", "attack=[]", "name=pruned",
)  # fmt: skip


def die_in_seventh_round() -> None:
    import gia_bench.federated.module as module

    play, calls = module.play_round, iter(range(100))

    def once_less(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return play(*args, **kwargs)

    module.play_round = once_less


def records(outputs: Path) -> list[dict[str, Any]]:
    [path] = outputs.glob("pruned/*/records.jsonl")
    return [r for r in map(json.loads, path.read_text().splitlines()) if r["unit"] != "s"]


RESUMED = {
    "prunefl": ("pruning.interval=4", "pruning.constant=0.01"),
    "snip_first_round": (),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_goes_on_with_its_masks(name: str, tmp_path: Path) -> None:
    run = (*RUN, f"pruning={name}", *RESUMED[name])
    done = gia_bench(tmp_path / "whole", *run)
    assert done.status == 0, done.err
    assert gia_bench(tmp_path / "broken", *run, before=die_in_seventh_round).status == -signal.SIGKILL
    assert gia_bench(tmp_path / "broken", *run).status == 0
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    up = {r["round"]: r["value"] for r in records(tmp_path / "whole") if r["metric"] == "uplink_bytes"}
    if name == "prunefl":
        assert up[4] < up[0] < up[3]
    else:
        assert {up[r] for r in range(1, 8)} == {up[1]} and up[1] < 0.25 * up[0]
