"""What differential privacy a run has spent, for defenses that give any."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, final

import lightning as L

from gia_bench.data.cohort import Cohort
from gia_bench.data.datamodule import FederatedDataModule
from gia_bench.defenses.base import Defense
from gia_bench.defenses.dp_accounting import Accounted, Budget, Mechanism, epsilon
from gia_bench.errors import ConfigError
from gia_bench.federated.module import FederatedModule
from gia_bench.federated.sampling import POISSON
from gia_bench.probes.recorder import Recorder

SAMPLED = {
    "example": "batches are shuffled (fl.local.sampling=poisson draws them as the accountant assumes)",
    "client": "a round has a fixed number of clients",
}
"""By unit, why it was not sampled as the accountant assumes."""
OTHERS = "other stages are left out of account"


class Spending(NamedTuple):
    """Repetitions of one mechanism: the noise's multiplier, the share of units in each, how many there were."""

    noise_multiplier: float
    sample_rate: float
    num_steps: int


@final
class PrivacyProbe(L.Callback):
    """After every evaluation, epsilon by Opacus' accountants for what the clients really did so far; the worst of them.

    ``example_epsilon_*`` (DP-SGD): an example of a client is in a local step with the chance batch size / examples of
    the client; steps are those of the rounds that the client played. ``client_local_epsilon_*`` (client_dp): the rounds
    that the client played, without amplification, since the server knows who plays. ``client_epsilon_*`` (client_dp):
    every round, with the chance clients per round / clients, and the noise of all clients that a round averages over.

    Neighbours differ in one unit's contribution (present, or 0). A record's remark holds delta, and says "nominal" and
    why where the accountant's sampling (Poisson) is not the run's (fl.local.sampling=shuffled; clients of a round are
    always drawn in a fixed number), or where other stages of a chain or a pruning, which may look at the data too, are
    left out of account. The budget is that of what is sent, which of a Poisson batch is the number of examples expected
    and not that which it holds; an attacker to whom a threat model shows the labels knows more.
    """

    def __init__(self, recorder: Recorder, data: FederatedDataModule) -> None:
        self.recorder, self.data = recorder, data
        self._steps: dict[int, int] = {}
        self._rates: dict[int, float] = {}
        self._played: dict[int, int] = {}
        self._gain = math.inf
        self._rounds = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, FederatedModule) and isinstance(batch, Cohort)
        if not accounted(pl_module.rules.defense):
            return  # nothing is spent that could be told
        dropped = outputs["report"].dropped
        weighted = pl_module.rules.weighting == "examples"
        weights = [w if weighted else 1 for c, w in zip(batch.clients, batch.weights, strict=True) if c not in dropped]
        # in the weighted sum of the updates: the noise's deviation over what one client changes
        self._gain = min(self._gain, math.sqrt(sum(w * w for w in weights)) / max(weights))
        self._rounds += 1
        for client, counts in zip(batch.clients, batch.counts, strict=True):
            held = len(self.data.partition.clients[client])
            rate, steps = pl_module.rules.local.poisson_rate(held), len(counts)
            if rate is None:  # a shuffled step without examples is not taken; an empty Poisson step sends its noise
                rate, steps = max(counts) / held, sum(n > 0 for n in counts)
            self._rates[client] = max(rate, self._rates.get(client, 0))
            self._steps[client] = self._steps.get(client, 0) + steps
            self._played[client] = self._played.get(client, 0) + 1

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FederatedModule)
        poisson = pl_module.rules.local.sampling == POISSON
        for mechanism, alone in accounted(pl_module.rules.defense):
            drawn = poisson and mechanism.unit == "example"
            for name, spendings in self._spent(mechanism).items():
                metric, r = f"{name}_{mechanism.accountant}", pl_module.round_index - 1
                try:
                    budgets = [_budget(mechanism, s, poisson=drawn) for s in worst(spendings)]
                except ConfigError as error:  # no noise, or no Opacus
                    self.recorder.add(metric, None, round=r, status="unavailable", reason=str(error))
                    continue
                most = max(budgets, key=lambda budget: budget.epsilon)
                whys = [SAMPLED[mechanism.unit]] * most.nominal + [OTHERS] * (not alone)
                remark = f"delta={most.delta:g}" + f", nominal: {'; '.join(whys)}" * bool(whys)
                self.recorder.add(metric, most.epsilon, round=r, reason=remark)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "rates": self._rates, "played": self._played,
                "gain": self._gain, "rounds": self._rounds}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._rates = dict(state_dict["steps"]), dict(state_dict["rates"])
        self._played, self._gain = dict(state_dict["played"]), state_dict["gain"]
        self._rounds = state_dict["rounds"]

    def _spent(self, mechanism: Mechanism) -> dict[str, set[Spending]]:
        """By metric, what the clients that may be worst off have spent."""
        sigma = mechanism.noise_multiplier
        if mechanism.unit == "example":
            return {"example_epsilon": {Spending(sigma, self._rates[c], n) for c, n in self._steps.items()}}
        rate = self.data.clients_per_round / len(self.data.partition.clients)
        return {
            "client_epsilon": {Spending(sigma * self._gain, rate, self._rounds)},
            "client_local_epsilon": {Spending(sigma, 1.0, max(self._played.values()))},
        }


def accounted(defense: Defense) -> list[tuple[Mechanism, bool]]:
    """The mechanisms among a defense's stages, and whether each is all there is."""
    return [(leaf.mechanism, defense is leaf) for leaf in defense.leaves() if isinstance(leaf, Accounted)]


def worst(spendings: Iterable[Spending]) -> list[Spending]:
    """Those that no other one exceeds in both sample rate and steps; they share their noise multiplier."""
    found: list[Spending] = []
    for spent in sorted(spendings, key=lambda s: (s.sample_rate, s.num_steps), reverse=True):
        if not found or spent.num_steps > found[-1].num_steps:
            found.append(spent)
    return found


def _budget(mechanism: Mechanism, spent: Spending, *, poisson: bool) -> Budget:
    return epsilon(
        noise_multiplier=spent.noise_multiplier, sample_rate=spent.sample_rate, num_steps=spent.num_steps,
        delta=mechanism.delta, accountant=mechanism.accountant, poisson=poisson,
    )  # fmt: skip
