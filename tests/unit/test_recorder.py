"""Records wait in memory for the next evaluation, but not without end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from gia_bench.probes import recorder
from gia_bench.probes.recorder import Origin, Recorder
from gia_bench.records.schema import Record
from gia_bench.records.store import RecordStore, read

ORIGIN = Origin(
    run_id="r1", experiment="e", seed=0, dataset="digits", model="mlp", fl="fedsgd", threat="curious_server",
    defense="none",
)  # fmt: skip


class Shown:
    """A mirror that remembers what it was shown at once."""

    def __init__(self) -> None:
        self.groups: list[list[int | None]] = []

    def show(self, records: Sequence[Record]) -> None:
        self.groups.append([r.round for r in records])


def test_many_rounds_without_an_evaluation_are_written_between_two_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MOST_PENDING", 4)
    path, mirror, nothing = tmp_path / "records.jsonl", Shown(), cast(Any, None)
    store = RecordStore(path)
    made = Recorder(ORIGIN, store, cast(Any, mirror))
    for played in range(4):
        made.on_train_batch_start(nothing, nothing, nothing, 0)
        made.extend([("train_loss", 1.0), ("round_seconds", 0.5), ("uplink_bytes", 8.0)], round=played)
    assert mirror.groups == [[0, 0, 0, 1, 1, 1]], "a round's records stay together"
    assert list(read(path)["round"]) == [0, 0, 0, 1, 1, 1]
    made.flush()
    store.close()
    assert list(read(path)["round"]) == [r for r in range(4) for _ in range(3)]
