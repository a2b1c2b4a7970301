"""What a round costs: bytes up and down beside the dense ones, seconds, and the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import lightning as L

from gia_bench.federated.module import RoundReport
from gia_bench.probes.recorder import Recorder


@final
class CostProbe(L.Callback):
    """Records every round."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        report = _report(outputs)
        self.recorder.extend(vars(report.cost).items(), round=report.round_index)
        self.recorder.add("train_loss", report.train_loss, round=report.round_index)
        for client in report.dropped:
            self.recorder.add(
                "dropped_clients", None, round=report.round_index, client=client, status="failed",
                reason="it vanished, or its update was not finite",
            )  # fmt: skip


def _report(outputs: Mapping[str, Any]) -> RoundReport:
    report = outputs["report"]
    assert isinstance(report, RoundReport)
    return report
