"""Rounds of every defense on small models of every kind, and what each threat shows of them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import hydra
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from gia_bench.compatibility import check_aggregation
from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.base import Defense
from gia_bench.errors import IncompatibleError
from gia_bench.federated.aggregation import Plain
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.secure import Secure
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.pruning.pruned import Pruned
from gia_bench.seeding import seeded, stream
from gia_bench.threat import ThreatModel
from gia_bench.values import Truth

SHAPE, CLASSES, CLIENTS, EACH = (3, 12, 12), 4, (3, 1), 4
PROTOCOLS: dict[str, LocalWork] = {
    "fedsgd": FedSGD(batch_size=2),
    "fedavg": FedAvg(learning_rate=0.05, epochs=1, batch_size=2),
}
AGGREGATIONS = {"plain": Plain(), "secure": Secure()}


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 36, CLASSES))


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, 2, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
    )


def connected() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def headless() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


MODELS = {f.__name__: f for f in (convolutional, normalised, connected, headless)}


def names(group: str) -> list[str]:
    found = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert found
    return found


@functools.cache
def composed(group: str, name: str) -> Any:
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        return instantiate(hydra.compose("config", overrides=[f"{group}={name}"])[group], _convert_="all")


@functools.cache
def data() -> InMemory:
    draw = stream(0, "pictures")
    return InMemory(torch.rand(400, *SHAPE, generator=draw), torch.arange(400) % CLASSES)


def play(
    defense: Defense, model: str, local: LocalWork, pruning: str, aggregation: str,
    chosen: Sequence[Sequence[Tensor]] | None = None, executor: Executor | None = None,
) -> Round:  # fmt: skip
    """A round as a run would compose and play it. Raises ``IncompatibleError`` as a run would."""
    wrapped = defense if pruning == "none" else Pruned(inner=defense, method=composed("pruning", pruning))
    with seeded(0, "model"):
        module = wrapped.prepare_model(MODELS[model]())
    victim = Victim(module=module, input_shape=SHAPE, num_classes=CLASSES)
    wrapped.check_victim(victim)
    wrapped = wrapped.calibrate(victim, data())
    steps = chosen or [local.schedule(EACH, 0, 0, c) for c in CLIENTS]
    cohort = Cohort(
        round_index=0, clients=CLIENTS, source=data(),
        steps=tuple(tuple(EACH * i + p for p in own) for i, own in enumerate(steps)),
        weights=tuple(local.weight(EACH, own) for own in steps),
    )  # fmt: skip
    rules = Rules(
        victim=victim, defense=wrapped, local=local, executor=executor or Vmap(), seed=0,
        aggregation=AGGREGATIONS[aggregation],
    )  # fmt: skip
    params, buffers = victim.initial()
    params, state = wrapped.settle(params, wrapped.init_server(params))
    with torch.no_grad():
        return play_round(rules, Server(params, buffers, state), {}, cohort, observed=CLIENTS)


def or_sentence(defense: str, *parts: Any) -> Round | None:
    """The round, or None where a sentence refuses it."""
    try:
        return play(composed("defense", defense), *parts)
    except IncompatibleError as refused:
        if not re.search(r"\w+( [\w=.(),:;-]+){6,}", str(refused)):
            raise AssertionError(f"no sentence: {refused}") from refused
        return None


@pytest.mark.parametrize("steps", [[[], [0, 1, 2]], [[], []]], ids=["beside a full one", "alone"])
@pytest.mark.parametrize("defense", names("defense"))
def test_a_defense_takes_an_empty_poisson_batch_in_a_loop_as_under_vmap(defense: str, steps: list[list[int]]) -> None:
    local = FedSGD(batch_size=2, sampling="poisson")
    chosen = [[torch.tensor(own, dtype=torch.int64)] for own in steps]
    alone, mapped = (
        play(composed("defense", defense), "convolutional", local, "none", "plain", chosen, executor)
        for executor in (Loop(), Vmap())
    )
    # a last digit may decide how half_precision rounds
    torch.testing.assert_close(mapped.aggregate, alone.aggregate, rtol=2e-3, atol=1e-5)
    assert all(v.isfinite().all() for v in alone.aggregate.values())


@pytest.mark.parametrize("defense", names("defense"))
def test_a_defense_runs_under_every_protocol_on_every_model_or_says_why_not(defense: str) -> None:
    ran = 0
    for model, protocol in itertools.product(MODELS, PROTOCOLS):
        played = or_sentence(defense, model, PROTOCOLS[protocol], "none", "plain")
        if played is None:
            continue
        ran += 1
        assert all(u.isfinite().all() for u in played.aggregate.values()), (model, protocol)
        assert played.transcript is not None
        for name in names("threat"):
            threat: ThreatModel = composed("threat", name)
            client = CLIENTS[0] if threat.sees_clients else None
            seen = threat.observe(played.transcript, _Private(), client, defense=composed("defense", defense))
            assert seen.update.keys() == seen.params.keys()
    assert ran >= 2, "a defense that never runs defends nothing"


@pytest.mark.parametrize("defense", names("defense"))
def test_a_defense_goes_with_every_pruning_and_aggregation_or_says_why_not(defense: str) -> None:
    for pruning, aggregation in itertools.product(names("pruning"), AGGREGATIONS):
        if pruning in ("prunefl_femnist", "prunefl_cifar10"):  # prunefl with the constants of one model each
            continue
        played = or_sentence(defense, "convolutional", PROTOCOLS["fedavg"], pruning, aggregation)
        assert played is None or all(u.isfinite().all() for u in played.aggregate.values()), (pruning, aggregation)


@pytest.mark.parametrize("name", names("threat"))
def test_a_threat_that_sees_clients_is_refused_where_their_updates_are_masked(name: str) -> None:
    threat: ThreatModel = composed("threat", name)
    if threat.sees_clients:
        with pytest.raises(IncompatibleError, match="threat=secure_aggregation"):
            check_aggregation("dlg", threat, AGGREGATIONS["secure"])
    else:
        check_aggregation("dlg", threat, AGGREGATIONS["secure"])


class _Private:
    """What the clients hold; only labels are asked for."""

    def truth(self, clients: Any) -> Truth:
        return Truth(data().pixels[:2], data().labels[:2])
