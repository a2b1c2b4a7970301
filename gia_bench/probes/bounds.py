"""How much a bound on leakage would let pass: a theory trend of gia_bench's own, for pruned updates."""

from __future__ import annotations

import math
from typing import Any, final

import lightning as L

from gia_bench.data.cohort import Cohort
from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.priprune import PriPrune
from gia_bench.federated.module import FederatedModule, RoundReport
from gia_bench.probes.recorder import Recorder
from gia_bench.pruning.pruned import Pruned
from gia_bench.values import Update

CONSTANT = 1.0
"""The constant of the bound's first term; nobody has published one for these models (gia_bench choice)."""


def leakage_bound(rank: float, batch_size: int, num_clients: int, constant: float = CONSTANT) -> float:
    """constant / ((N - 1) B) + (rank / 2) log(N / (N - 1)) in nats, for one round; infinite for N = 1.

    Modelled on what secure aggregation of N clients with batches of B examples leaks of one of them, by the rank of the
    gradients' covariance (Elkordy et al., PETS 2023). Of d parameters of which the share p is pruned, that rank is
    at most (1 - p) d. PriPrune states bounds that fall with p and with B, and does not publish their formulas as far
    as we know: this is a gia_bench choice with the same directions, a trend and not the paper's bound. It holds for no
    single client that the server sees alone. Raises ``ValueError`` for a rank below 0, or B or N below 1.
    """
    if rank < 0 or batch_size < 1 or num_clients < 1:
        raise ValueError(f"rank={rank}, batch_size={batch_size}, num_clients={num_clients}: no such round.")
    if num_clients == 1:
        return math.inf
    return constant / ((num_clients - 1) * batch_size) + rank / 2 * math.log(num_clients / (num_clients - 1))


@final
class BoundsProbe(L.Callback):
    """At an attacked round, where weights are pruned or PriPrune withholds some: ``sent_share``, (1 - p), the entries
    of an observed update that are not zero over all d, and ``leakage_trend_nats`` for that rank, the update's distinct
    examples, and the clients of the round. Behind secure aggregation, of the mean and of the fewest examples.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, FederatedModule) and isinstance(batch, Cohort)
        report: RoundReport = outputs["report"]
        seen = report.transcript
        if seen is None or not trainer.is_global_zero or not prunes(pl_module.rules.defense):
            return
        examples = dict(zip(batch.clients, batch.num_examples, strict=True))
        targets: list[tuple[int | None, Update, int]] = [(c, u, examples[c]) for c, u in seen.updates.items()]
        for client, update, count in targets or [(None, seen.aggregate, min(examples[c] for c in seen.clients))]:
            self._record(update, count, len(seen.clients), round=report.round_index, client=client)

    def _record(self, update: Update, num_examples: int, num_clients: int, **place: Any) -> None:
        rank = sum(int(t.count_nonzero()) for t in update.values())
        self.recorder.add("sent_share", rank / sum(t.numel() for t in update.values()), **place)
        if num_clients == 1 or not num_examples:
            alone = "of a client alone in its round nothing is averaged away, so that no bound of this form exists"
            reason = alone if num_clients == 1 else "an empty batch has nothing that could leak"
            self.recorder.add("leakage_trend_nats", None, status="unavailable", reason=reason, **place)
            return
        self.recorder.add("leakage_trend_nats", leakage_bound(rank, num_examples, num_clients), **place)


def prunes(defense: Defense) -> bool:
    """Whether weights are pruned, or changes withheld by a client's own mask, at any stage."""
    if isinstance(defense, Chain):
        return any(prunes(stage) for stage in defense.parts)
    return isinstance(defense, Pruned | PriPrune)
