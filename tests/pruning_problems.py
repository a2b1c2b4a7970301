"""A small federation whose model is pruned, for the tests of every pruning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.precision import HalfPrecision, Int8
from gia_bench.defenses.top_k import TopK
from gia_bench.federated.execution import Executor, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning
from gia_bench.pruning.pruned import OWN
from gia_bench.seeding import seeded, stream
from gia_bench.values import Params, Shared, State
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
