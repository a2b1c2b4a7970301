"""Masks that are made in or before the first round, and that outlive a killed run."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import gia_bench
from pruning_problems import (
    FEDAVG,
    FEDSGD,
    announced,
    cohort,
    federation,
    images,
    off,
    victim,
)

from gia_bench.defenses.base import Defense
from gia_bench.defenses.none import NoDefense
from gia_bench.federated.execution import Vmap
from gia_bench.federated.round import play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalWork
from gia_bench.pruning.initial import InitialPruning
from gia_bench.pruning.pruned import OWN, Pruned
from gia_bench.pruning.prunefl import PruneFL
from gia_bench.pruning.snip import SNIP
from gia_bench.wire.aligned import MASK


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
