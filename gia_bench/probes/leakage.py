"""Launches the attacks at their rounds and records what they rebuilt."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, final

import lightning as L
import torch

from gia_bench.attacks.base import Attack
from gia_bench.data.cohort import Cohort
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import StorageError
from gia_bench.federated.module import FederatedModule, RoundReport
from gia_bench.federated.rules import Rules
from gia_bench.metrics import Metrics, Scores, evaluate
from gia_bench.metrics.evaluate import NOBODY
from gia_bench.probes.feasibility import feasibility, tell, tell_control
from gia_bench.probes.history import History
from gia_bench.probes.malicious import play_malicious_round
from gia_bench.probes.recorder import Recorder
from gia_bench.probes.snapshots import FileSnapshots
from gia_bench.records.images import save_images
from gia_bench.seeding import derive
from gia_bench.threat import ThreatModel
from gia_bench.values import Examples, Observation, Reconstruction, Transcript, Truth

SNAPSHOTS = "snapshots"


@final
class LeakageProbe(L.Callback):
    """At an observed round every attack gets all its victims at once; then each is measured against its truth. For an
    attack that needs a malicious server, that round is played once more beside the honest one (``probes.malicious``).

    folder: the run's; images: whether private images and reconstructions are kept there.
    """

    def __init__(
        self,
        *,
        recorder: Recorder,
        attacks: Mapping[str, Attack],
        threat: ThreatModel,
        metrics: Metrics,
        public: Examples,
        folder: Path,
        images: bool,
        snapshot_every_seconds: float,
    ) -> None:
        self.recorder, self.attacks, self.threat = recorder, attacks, threat
        self.metrics, self.public = metrics, public
        self.folder, self.images, self.seconds = folder, images, snapshot_every_seconds
        self._remembers = any(attack.remembers for attack in attacks.values())
        self._history, self._saved = History(), list[dict[str, Any]]()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self._history.pack() or self._saved, "rounds": dict(self._history.rounds)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._remembers and "rounds" not in state_dict:
            raise StorageError(
                "The run's checkpoint was written by an earlier version, which did not count the rounds of every "
                "client; take force=true to begin the run anew."
            )
        self._saved, self._history.rounds = state_dict["history"], Counter(state_dict.get("rounds", {}))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, FederatedModule) and isinstance(batch, Cohort)
        report: RoundReport = outputs["report"]
        if report.transcript is not None and trainer.is_global_zero:
            observed = pl_module.observed(batch)
            for name, attack in self.attacks.items():
                transcript: Transcript | None = report.transcript
                rules, dropped = pl_module.rules, report.dropped
                if attack.needs:
                    assert report.before is not None
                    played = play_malicious_round(
                        name, attack, rules, report.before, batch, observed, self.threat, self.public
                    )
                    transcript, dropped = played.transcript, played.dropped
                    rules = dataclasses.replace(rules, victim=played.victim, defense=played.defense)
                if transcript is not None:
                    self._attack(name, attack, transcript, batch, rules)
                self._record_dropped(name, batch, set(observed) & set(dropped), nobody=transcript is None)
            if self._remembers:
                for client, seen in self._observe(report.transcript, batch, pl_module.rules).items():
                    self._history.add(client, report.round_index, seen)
            self.recorder.flush()
        if self._remembers:
            self._history.rounds.update(batch.clients)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Only now: until a checkpoint stands behind an attacked round, a resumed run may attack it again."""
        if trainer.is_global_zero:
            shutil.rmtree(self.folder / SNAPSHOTS, ignore_errors=True)

    def _attack(self, name: str, attack: Attack, transcript: Transcript, cohort: Cohort, rules: Rules) -> None:
        round_index, seen = transcript.round_index, self._observe(transcript, cohort, rules)
        if attack.remembers:
            self._history.unpack(self._saved, next(iter(seen.values())), rules.local)
            seen = {client: self._history.known_to(client, o, round_index) for client, o in seen.items()}
        empty = [c for c in seen if not sum(cohort.num_examples[m] for m in _behind(c, transcript, cohort))]
        for client in empty:
            self._record_nothing(name, cohort, client, NOBODY)
            del seen[client]
        if not seen:
            return
        seeds = [derive(rules.seed, "attack", name, round_index, -1 if c is None else c) for c in seen]
        snapshots = FileSnapshots(self.folder / SNAPSHOTS, f"round{round_index:06d}_{name}_", self.seconds)
        known = {client: feasibility(observation, rules.victim) for client, observation in seen.items()}
        tell(name, [*known.values()])
        for client, values in known.items():
            self.recorder.extend(values.items(), round=round_index, client=client, attack=name)
        started = time.perf_counter()
        rebuilt = attack.reconstruct_many([*seen.values()], rules.victim, seeds=seeds, snapshots=snapshots)
        self.recorder.add("attack_seconds", time.perf_counter() - started, round=round_index, attack=name)
        found = []
        for client, reconstruction in zip(seen, rebuilt, strict=True):
            truth = cohort.truth(transcript.clients if client is None else (client,))
            scores = evaluate(reconstruction, truth, self.metrics)
            found.append(scores)
            self._record(name, round_index, client, scores)
            self._record_search(name, round_index, client, reconstruction)
            if self.images:
                self._save(name, round_index, client, reconstruction, truth, scores)
        if isinstance(rules.defense, NoDefense):
            tell_control(name, found)

    def _observe(self, transcript: Transcript, cohort: Cohort, rules: Rules) -> dict[int | None, Observation]:
        """What the threat model shows of each target: a client, or None for the sum."""
        local = rules.local.at(transcript.round_index)
        targets: list[int | None] = [*transcript.updates] if self.threat.sees_clients else [None]
        return {
            client: self.threat.observe(
                transcript, cohort, client, local=local, defense=rules.defense, public=self.public
            )
            for client in targets
        }

    def _record_dropped(self, attack: str, cohort: Cohort, clients: Collection[int], nobody: bool) -> None:
        """A client that was to be attacked and sent nothing is counted, not forgotten. nobody: no sum either."""
        gone: list[int | None] = [*sorted(clients)] if self.threat.sees_clients else [None] * nobody
        for client in gone:
            self._record_nothing(attack, cohort, client, "the client was dropped: its update was not finite")

    def _record_nothing(self, attack: str, cohort: Cohort, client: int | None, why: str) -> None:
        truth = cohort.truth(cohort.clients if client is None else (client,))
        nothing = Reconstruction(inputs=torch.zeros_like(truth.inputs), labels=None, score=float("inf"), failure=why)
        self._record(attack, cohort.round_index, client, evaluate(nothing, truth, self.metrics))

    def _record(self, attack: str, round_index: int, client: int | None, scores: Scores) -> None:
        for value in scores.values:
            self.recorder.add(
                value.metric, value.value, round=round_index, client=client, victim=value.victim, attack=attack,
                status=value.status, reason=value.reason,
            )  # fmt: skip

    def _record_search(self, attack: str, round_index: int, client: int | None, rebuilt: Reconstruction) -> None:
        """What the attacker himself sees of his success; a search that left the numbers is counted beside what its
        best iterate before scores."""
        place: dict[str, Any] = {"round": round_index, "client": client, "attack": attack}
        if rebuilt.failure is None:
            self.recorder.add("attack_score", rebuilt.score, **place)
        else:
            self.recorder.add("attack_score", None, status="failed", reason=rebuilt.failure, **place)
        if rebuilt.diverged is not None:
            reason = "the best iterate before is measured" if rebuilt.diverged else None
            self.recorder.add("diverged_restarts", rebuilt.diverged, reason=reason, **place)

    def _save(
        self, attack: str, round_index: int, client: int | None, rebuilt: Reconstruction, truth: Truth, scores: Scores
    ) -> None:
        path = save_images(self.folder, round_index, client, attack, rebuilt, truth, scores)
        self.recorder.mirror.show_images(path, round_index)


def _behind(client: int | None, transcript: Transcript, cohort: Cohort) -> list[int]:
    """The positions in the cohort of those whose examples an observation is of."""
    return [cohort.clients.index(c) for c in (transcript.clients if client is None else (client,))]
