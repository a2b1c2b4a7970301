"""Lightning's view of a federation: one training step is one round."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from gia_bench.allocator import keep_freed_memory
from gia_bench.data.cohort import Cohort
from gia_bench.federated.announcements import Announcements
from gia_bench.federated.ranks import Ranks, current_ranks
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.schedule import Schedule
from gia_bench.federated.states import ClientStates, MemoryStates
from gia_bench.values import Buffers, Params, State, Transcript
from gia_bench.wire import shared_bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundCost:
    """Bytes of one client in one round (mean over the cohort), as packed and as a dense model would take; seconds of
    the whole round on the server's clock."""

    uplink_bytes: float
    downlink_bytes: float
    dense_uplink_bytes: float
    dense_downlink_bytes: float
    round_seconds: float


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundReport:
    """What a training step tells the probes; ``transcript`` and ``before`` only where the round is observed. before:
    the server and the cohort's clients' states as they were when the round began, to play it again in another way.
    """

    round_index: int
    transcript: Transcript | None
    before: tuple[Server, Mapping[int, State]] | None
    cost: RoundCost
    train_loss: float
    dropped: tuple[int, ...]


@final
class FederatedModule(L.LightningModule):
    """Holds the server's model, its optimizer and everybody's states; the numbers come from ``play_round``."""

    def __init__(self, rules: Rules, schedule: Schedule, num_classes: int, states: ClientStates | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rules, self.schedule = rules, schedule
        # a copy: the victim keeps the model as it is published, which is all that some attackers know
        self.network = copy.deepcopy(rules.victim.module)
        self.round_index = 0
        self.client_states = MemoryStates() if states is None else states
        self.server_state: State = {}
        self._settle(rules.defense.init_server(self.params()))
        self.announcements = Announcements()
        self.played_last: frozenset[int] = frozenset()
        self.played_always: frozenset[int] = frozenset()
        self.aggregate_bytes = 0
        self.accuracy = MulticlassAccuracy(num_classes=num_classes, average="micro")
        self._ranks: Ranks | None = None

    def params(self) -> Params:
        """The server's parameters, sharing memory with the optimizer's."""
        return {k: p.detach() for k, p in self.network.named_parameters()}

    def buffers_now(self) -> Buffers:
        """The server's BatchNorm statistics."""
        return {k: b.detach() for k, b in self.network.named_buffers()}

    def configure_optimizers(self) -> Any:
        return self.schedule.server.configure(self.network.parameters())

    def on_fit_start(self) -> None:
        keep_freed_memory()  # in every rank's own process
        self._ranks = current_ranks()
        self.client_states.begin()
        self.rules = dataclasses.replace(self.rules, victim=self.rules.victim.to(self.device))
        self.server_state = {k: v.to(self.device) for k, v in self.server_state.items()}

    def training_step(self, cohort: Cohort, batch_index: int) -> Mapping[str, Any]:
        """One round; the aggregate becomes the gradient of the server's optimizer."""
        started = time.perf_counter()
        server = Server(self.params(), self.buffers_now(), self.server_state)
        with torch.no_grad():
            played = play_round(
                self.rules, server, self.client_states, cohort, observed=self.observed(cohort), ranks=self._ranks,
                keep=self.client_states.keep,
            )  # fmt: skip
        before = None
        if played.transcript is not None:
            seen = played.transcript
            # the transcript's copies: the optimizer is about to write into the server's own tensors
            before = (
                Server(seen.params, seen.buffers, self.server_state),
                {c: self.client_states[c] for c in cohort.clients if c in self.client_states},
            )
        self._step(played)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        cost = self._cost(played, cohort, time.perf_counter() - started)
        self.client_states.commit(cohort.round_index, played.states)
        self.played_last, self.aggregate_bytes = frozenset(cohort.clients), played.aggregate_bytes
        self.played_always = self.played_last if cohort.round_index == 0 else self.played_always & self.played_last
        self.round_index = cohort.round_index + 1
        report = RoundReport(
            round_index=cohort.round_index, transcript=played.transcript, before=before, cost=cost,
            train_loss=played.loss, dropped=played.dropped,
        )  # fmt: skip
        return {"report": report}

    def observed(self, cohort: Cohort) -> tuple[int, ...]:
        """The clients whose updates are kept this round."""
        due = cohort.round_index in self.schedule.attack_rounds
        return cohort.clients[: self.schedule.attack_clients] if due else ()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Utility: accuracy on the test split."""
        inputs, labels = batch
        logits, _ = self.rules.victim.logits(self.params(), self.buffers_now(), inputs, training=False)
        self.accuracy.update(logits, labels)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["federation"] = {
            "round_index": self.round_index,
            "client_states": self.client_states.saved(),
            "server_state": self.server_state,
            "played_last": sorted(self.played_last),
            "played_always": sorted(self.played_always),
            "aggregate_bytes": self.aggregate_bytes,
            "announcements": self.announcements.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["federation"]
        self.round_index, self.aggregate_bytes = saved["round_index"], saved["aggregate_bytes"]
        self.client_states.restore(saved["client_states"])
        self.server_state = saved["server_state"]
        self.played_last, self.played_always = frozenset(saved["played_last"]), frozenset(saved["played_always"])
        self.announcements = Announcements.of(saved["announcements"])

    def _step(self, played: Round) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.grad = played.aggregate[name]
        for name, buffer in self.network.named_buffers():
            buffer.copy_(played.buffers[name])
        self.optimizers().step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self._settle(played.server_state)

    def _settle(self, server_state: State) -> None:
        """The defense's last word on the server's model."""
        params = self.params()
        settled, self.server_state = self.rules.defense.settle(params, server_state)
        for name, own in params.items():
            if settled[name] is not own:
                own.copy_(settled[name])

    def _cost(self, played: Round, cohort: Cohort, seconds: float) -> RoundCost:
        """A client that can take the server's step itself downloads only the aggregate; others, the model. Of an
        announcement it downloads what it does not hold yet.

        It can take the step if it played the round before and the optimizer remembers nothing, or if it has played
        every round.
        """
        buffers = sum(b.nbytes for b in self.buffers_now().values())
        model = sum(p.nbytes for p in self.params().values())
        able = self.played_always if self._optimizer_remembers() else self.played_last
        current = sum(c in able for c in cohort.clients)
        num_clients = len(cohort.clients)
        announced = shared_bytes(played.shared)
        down = (current * self.aggregate_bytes + (num_clients - current) * played.model_bytes) / num_clients
        return RoundCost(
            # the leader of a round sends its announcement up, everybody takes it down
            uplink_bytes=sum(played.uplink_bytes.values()) / len(played.uplink_bytes)
            + played.led * announced / num_clients,
            downlink_bytes=down
            + buffers
            + self.announcements.tell(played.shared, cohort.clients)
            + self.rules.aggregation.downlink_bytes(num_clients),
            dense_uplink_bytes=model + buffers,
            dense_downlink_bytes=model + buffers,
            round_seconds=seconds,
        )

    def _optimizer_remembers(self) -> bool:
        """Whether a step depends on earlier ones (momentum, Adam)."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return any(isinstance(v, Tensor) for state in optimizer.state.values() for v in state.values())
