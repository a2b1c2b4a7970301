"""A run that is killed at any moment and started again ends with the records of a run that was never killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import SMALL, gia_bench

COMMAND = (
    "dataset=digits", "model=lenet_zhu", "defense=dgp", "attack=[dlg,inverting_gradients_fast]", "name=resume",
    "fl.rounds=14", "fl.eval_every=4", "fl.attack_rounds=[5,9]", "partition.num_clients=4", "fl.local.batch_size=2",
    "attack.dlg.steps=4", "attack.dlg.snapshot_every=1", "attack.inverting_gradients_fast.steps=12",
    "attack.inverting_gradients_fast.snapshot_every=3", "trainer.snapshot_every_seconds=0",
    "metrics.lpips=null",
)  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth_call(n: int, then: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with its n-th call (from 1) replaced by ``then``."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return then(*args, **kwargs) if calls == n else function(*args, **kwargs)

    return counted


def kill_in_training() -> None:
    import gia_bench.federated.module as module

    module.play_round = nth_call(7, lambda *a, **k: die(), module.play_round)


def kill_in_first_rounds() -> None:
    import gia_bench.federated.module as module

    module.play_round = nth_call(3, lambda *a, **k: die(), module.play_round)


def kill_in_attack() -> None:
    from gia_bench.probes.snapshots import FileSnapshots

    save = FileSnapshots.save

    def save_then_die(self: FileSnapshots, key: str, state: Any) -> None:
        save(self, key, state)
        die()

    FileSnapshots.save = nth_call(6, save_then_die, save)  # type: ignore[method-assign]


def kill_in_second_attacked_round() -> None:
    from gia_bench.probes.snapshots import FileSnapshots

    FileSnapshots.save = nth_call(11, lambda *a: die(), FileSnapshots.save)  # type: ignore[method-assign]


def kill_in_write() -> None:
    from gia_bench.records.store import RecordStore

    def half(self: RecordStore, records: Any) -> None:
        with self.path.open("a") as file:
            file.write(next(iter(records)).to_json()[:40])
            file.flush()
        die()

    RecordStore.append = nth_call(3, half, RecordStore.append)  # type: ignore[method-assign]


def kill_in_validation() -> None:
    from gia_bench.federated.module import FederatedModule

    FederatedModule.validation_step = nth_call(2, lambda *a: die(), FederatedModule.validation_step)  # type: ignore[method-assign]


def kill_after_checkpoint() -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def save_then_die(self: ModelCheckpoint, trainer: Any, path: str) -> None:
        trainer.save_checkpoint(path, False)
        die()

    ModelCheckpoint._save_checkpoint = nth_call(2, save_then_die, ModelCheckpoint._save_checkpoint)  # type: ignore[method-assign]


KILLS = (
    kill_in_first_rounds, kill_in_training, kill_in_attack, kill_in_second_attacked_round, kill_in_write,
    kill_in_validation, kill_after_checkpoint,
)  # fmt: skip


def start(outputs: Path, *more: str, kill: Callable[[], None] | None = None) -> int:
    return gia_bench(outputs, *COMMAND, *more, before=kill).status


def records(outputs: Path) -> list[dict[str, Any]]:
    """All but the clock's."""
    [path] = outputs.glob("resume/*/records.jsonl")
    return [r for r in map(json.loads, path.read_text().splitlines()) if r["unit"] != "s"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    outputs = tmp_path_factory.mktemp("unbroken")
    assert start(outputs) == 0
    return records(outputs)


def test_the_unbroken_run_records_everything_once(unbroken: list[dict[str, Any]]) -> None:
    places = [(r["metric"], r["round"], r["client"], r["victim"], r["attack"]) for r in unbroken]
    assert len(places) == len(set(places))
    assert {r["round"] for r in unbroken if r["metric"] == "test_accuracy"} == {3, 7, 11, 13}
    assert {r["round"] for r in unbroken if r["metric"] == "psnr_db"} == {5, 9}
    assert {r["round"] for r in unbroken if r["metric"] == "uplink_bytes"} == set(range(14))


@pytest.mark.parametrize("kill", KILLS, ids=lambda k: k.__name__)
def test_a_killed_run_ends_with_the_same_records(
    kill: Callable[[], None], unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert start(tmp_path, kill=kill) == -signal.SIGKILL
    assert json.loads(next(tmp_path.glob("resume/*/status.json")).read_text())["state"] == "running"
    assert start(tmp_path) == 0
    assert records(tmp_path) == unbroken
    assert json.loads(next(tmp_path.glob("resume/*/status.json")).read_text())["state"] == "done"


def test_a_killed_run_with_residuals_on_disk_ends_with_the_records_of_one_that_held_them_in_memory(
    unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert start(tmp_path, "fl.client_states=disk", kill=kill_after_checkpoint) == -signal.SIGKILL
    assert start(tmp_path, "fl.client_states=disk") == 0
    assert [r | {"run_id": ""} for r in records(tmp_path)] == [r | {"run_id": ""} for r in unbroken]
    files = {path.name for path in tmp_path.glob("resume/*/client_states/*")}
    assert files == {
        f"client{c}.round{r}.pt" for c in range(4) for r in (11, 13)
    }  # the last checkpoint's, and the end's


def test_a_finished_run_is_skipped_and_force_runs_it_again(tmp_path: Path) -> None:
    assert gia_bench(tmp_path, *SMALL).status == 0
    [path] = tmp_path.rglob("records.jsonl")
    before = path.stat().st_mtime_ns
    assert gia_bench(tmp_path, *SMALL).status == 0
    assert path.stat().st_mtime_ns == before
    assert gia_bench(tmp_path, *SMALL, "force=true").status == 0
    assert path.stat().st_mtime_ns > before
