"""How far what a client sends is from its own update, and where that update's energy lies: what the theory of dual
gradient pruning (Xue et al., AAAI 2024, proposition 1 and figure 1) is about."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, final

import lightning as L
import torch
from torch import Tensor

from gia_bench.data.cohort import Cohort
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import Defense
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.selection import exact, ranks
from gia_bench.federated.clients import Clients
from gia_bench.federated.module import FederatedModule, RoundReport
from gia_bench.federated.rules import Rules, Server
from gia_bench.probes.recorder import Recorder
from gia_bench.values import Transcript, Update
from gia_bench.wire import bits_of

K1, K2 = 0.05, 0.75
"""The shares of the largest and of the smallest entries, as in the authors' DGP, where a run's defense has none."""


class Energy(NamedTuple):
    """Of one update g, all tensors together: ||g - sent|| / ||g||; and the shares of ||g||^2 in the floor(k1 n) largest
    magnitudes of every tensor and in the smallest ones that DGP drops, in [0, 1]. NaN where g is 0."""

    relative_gradient_distance: float
    energy_top_k1: float
    energy_bottom_k2: float


@final
class TheoryProbe(L.Callback):
    """At an attacked round, for every observed client. Its own update is what it would have sent without any defense,
    from the same model and the same private examples; it is computed again here, alone, and kept nowhere. Rounds that a
    malicious server plays beside the honest one are not looked at.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, FederatedModule) and isinstance(batch, Cohort)
        report: RoundReport = outputs["report"]
        if report.transcript is None or not trainer.is_global_zero:
            return
        k1, k2 = shares(pl_module.rules.defense)
        for client, sent in report.transcript.updates.items():
            measured = measure(undefended(pl_module.rules, report.transcript, batch, client), sent, k1, k2)
            self.recorder.extend(measured._asdict().items(), round=report.round_index, client=client)


def shares(defense: Defense) -> tuple[float, float]:
    """k1 and k2 of the run's own dual pruning, so that a sweep over them is told about what it drops."""
    own = (leaf for leaf in defense.leaves() if isinstance(leaf, DGP | ADGP))
    return next(((leaf.k1, leaf.k2) for leaf in own), (K1, K2))


@torch.no_grad()
def undefended(rules: Rules, transcript: Transcript, cohort: Cohort, client: int) -> Update:
    """What a client of the round would have sent without any defense. PRIVATE: for measurement only.

    Of a model that the defense has changed (PRECODE) it is that model's update, without the defense's randomness.
    """
    bare = dataclasses.replace(rules, defense=NoDefense())
    server = Server(transcript.params, transcript.buffers, {})
    update, _ = Clients(bare, server, {}, cohort).ask(cohort.clients.index(client))
    return update


def measure(update: Update, sent: Update, k1: float = K1, k2: float = K2) -> Energy:
    """``update``, ``sent``: by parameter name; ranks are per tensor, as DGP takes them."""
    whole = _energy(update)
    if whole == 0:
        return Energy(math.nan, math.nan, math.nan)
    distance = math.sqrt(_energy({k: g - sent[k].to(g) for k, g in update.items()}) / whole)
    top, bottom = 0.0, 0.0
    for g in update.values():
        entries = g.reshape(-1)
        n, magnitudes = entries.numel(), bits_of(entries.abs())
        dropped = math.floor(exact(k1) * n)
        upper = n - math.floor((exact(k1) + exact(k2)) * n) + dropped
        top += _energy({"top": entries[ranks(magnitudes, 0, dropped)]})
        bottom += _energy({"bottom": entries[~ranks(magnitudes, 0, upper)]})
    return Energy(distance, top / whole, bottom / whole)


def _energy(tensors: dict[str, Tensor]) -> float:
    """||.||^2 of all tensors together."""
    return float(torch.stack([t.double().square().sum() for t in tensors.values()]).sum())
