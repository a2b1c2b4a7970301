"""What the training achieves, and what a defense's memory looks like while it does."""

from __future__ import annotations

from collections import defaultdict
from typing import final

import lightning as L

from gia_bench.federated.module import FederatedModule
from gia_bench.probes.recorder import Recorder


@final
class UtilityProbe(L.Callback):
    """Test accuracy after a round, and the mean over clients of what the defense measures of its own state (the
    residual's norm, the share of coordinates never sent)."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, FederatedModule)
        last = pl_module.round_index - 1
        self.recorder.add("test_accuracy", float(pl_module.accuracy.compute()), round=last)
        pl_module.accuracy.reset()
        measured = defaultdict(list)
        for state in pl_module.client_states.values():
            for name, value in pl_module.rules.defense.measure(state).items():
                measured[name].append(float(value))
        for name, values in measured.items():
            self.recorder.add(name, sum(values) / len(values), round=last)
