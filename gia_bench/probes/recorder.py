"""From measured values to records: adds the run's identity, writes the file, then shows the same to the mirror."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, final

import lightning as L

from gia_bench.records.mirror import Mirror
from gia_bench.records.schema import Record
from gia_bench.records.store import RecordStore

MOST_PENDING = 1000
"""A round that begins while so many records wait writes them first, so that memory does not grow with rounds."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What every record of a run says of it: the choices of the config groups by name."""

    run_id: str
    experiment: str
    seed: int
    dataset: str
    model: str
    fl: str
    threat: str
    defense: str


@final
class Recorder(L.Callback):
    """Keeps records until they are due, then appends them in one go. As a callback it ties the file to the checkpoints:
    a checkpoint knows how much of the file was written before it, and a resumed run cuts off what came after.
    """

    def __init__(self, origin: Origin, store: RecordStore, mirror: Mirror) -> None:
        self.origin, self.store, self.mirror = origin, store, mirror
        self._origin = asdict(origin)
        self._pending: list[Record] = []
        self._active = True

    def add(self, metric: str, value: float | None, **place: Any) -> None:
        """One value; ``place``: round, client, victim, attack, status, reason as far as they apply."""
        self._pending.append(Record.of(metric, value, **self._origin, **place))

    def flush(self) -> None:
        """Write what is pending; on rank zero only, since every rank computes the same records."""
        pending, self._pending = self._pending, []
        if pending and self._active:
            self.store.append(pending)
            self.mirror.show(pending)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._active = trainer.is_global_zero

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return {"offset": self.store.offset}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._active:
            self.store.truncate(state_dict["offset"])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if len(self._pending) >= MOST_PENDING:  # between rounds: one round's records stay together
            self.flush()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flush()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.flush()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.flush()

    def extend(self, values: Iterable[tuple[str, float | None]], **place: Any) -> None:
        """Several metrics of one place."""
        for metric, value in values:
            self.add(metric, value, **place)
