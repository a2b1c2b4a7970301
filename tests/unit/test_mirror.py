"""A mirror shows what the records hold; whatever breaks in it, the run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gia_bench.records.mirror import CsvMirror, Mirror, WandbMirror, wandb_logger
from gia_bench.records.schema import Record
from gia_bench.records.store import RecordStore

WHO: dict[str, Any] = {
    "run_id": "r1", "experiment": "demo", "seed": 0, "dataset": "digits", "model": "lenet", "fl": "fedsgd",
    "threat": "curious_server", "defense": "none",
}  # fmt: skip


def _record(metric: str, value: float | None, **place: Any) -> Record:
    return Record.of(metric, value, **WHO, **place)


def _write_and_show(mirror: Mirror, store: RecordStore, *records: Record) -> None:
    store.append(records)
    mirror.show(records)


def _table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv")


def test_a_round_that_is_recorded_in_several_goes_is_one_row_of_medians(tmp_path: Path) -> None:
    store, mirror = RecordStore(tmp_path / "records.jsonl"), CsvMirror(tmp_path)
    for r in range(2):
        _write_and_show(mirror, store, _record("train_loss", 2.0 - r, round=r))
        _write_and_show(mirror, store, _record("test_accuracy", 0.25 + r / 2, round=r))
    leaks = [_record("psnr_db", v, round=1, client=0, victim=i, attack="dlg") for i, v in enumerate((9.0, 10.0, 29.0))]
    failed = _record("psnr_db", None, round=1, attack="dlg", status="failed", reason="no numbers")
    _write_and_show(mirror, store, *leaks, failed)
    mirror.close()
    expected = {
        "round": [0, 1],
        "dlg/psnr_db": [float("nan"), 10.0],
        "test_accuracy": [0.25, 0.75],
        "train_loss": [2.0, 1.0],
    }
    pd.testing.assert_frame_equal(_table(tmp_path), pd.DataFrame(expected))
    store.close()


def test_a_resumed_run_keeps_the_rows_of_its_first_part_and_drops_what_was_cut(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records.jsonl")
    first = CsvMirror(tmp_path)
    _write_and_show(first, store, _record("train_loss", 3.0, round=0))
    seen = store.offset
    _write_and_show(first, store, _record("train_loss", 9.0, round=1))
    first.close()
    again = CsvMirror(tmp_path)
    assert _table(tmp_path)["round"].tolist() == [0, 1]
    store.truncate(seen)
    _write_and_show(again, store, _record("train_loss", 1.0, round=1))
    again.close()
    assert _table(tmp_path)["train_loss"].tolist() == [3.0, 1.0]
    store.close()


def test_a_run_that_recorded_nothing_has_an_empty_table(tmp_path: Path) -> None:
    RecordStore(tmp_path / "records.jsonl").close()
    CsvMirror(tmp_path).close()
    assert (tmp_path / "metrics.csv").read_text() == "round\n"


class Broken:
    """A W&B that fails at everything with an error that nobody foresaw."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.experiment = error, self
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def fail(*args: Any, **kwargs: Any) -> None:
            self.calls.append(name)
            raise self.error

        return fail


class UnforeseenError(Exception):
    pass


def _broken(error: BaseException) -> tuple[WandbMirror, Broken]:
    mirror, broken = WandbMirror(), Broken(error)
    mirror._logger = broken
    return mirror, broken


def test_whatever_wandb_raises_is_told_once_in_one_line_and_what_is_open_is_still_let_go_of() -> None:
    mirror, broken = _broken(UnforeseenError("two\nlines"))
    with pytest.warns(UserWarning, match=r"^W&B stopped \(two lines\); records.jsonl goes on without it\.$"):
        mirror.show([_record("train_loss", 1.0, round=0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mirror.show([_record("train_loss", 1.0, round=1)])
        mirror.show_images(Path("absent.npz"), 0)
        mirror.close()
    assert broken.calls == ["log_metrics", "finish"], "else the next run of a sweep would get this one's W&B run"


def test_a_wandb_that_fails_only_at_the_end_is_told_too() -> None:
    with pytest.warns(UserWarning, match=r"W&B stopped \(late\)"):
        _broken(UnforeseenError("late"))[0].close()


def test_an_interrupt_is_no_broken_mirror() -> None:
    with pytest.raises(KeyboardInterrupt):
        _broken(KeyboardInterrupt())[0].show([_record("train_loss", 1.0, round=0)])


def test_images_that_cannot_be_read_end_wandb_alone(tmp_path: Path) -> None:
    mirror = wandb_logger("offline", "project", None)(tmp_path, "r1", {})
    (tmp_path / "cut.npz").write_bytes(b"PK")
    with pytest.warns(UserWarning, match=r"W&B stopped \(.*cut.npz is not a file of saved images"):
        mirror.show_images(tmp_path / "cut.npz", 0)
    mirror.close()


def test_settings_that_wandb_refuses_end_wandb_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    mirror = wandb_logger("offline", "project", None)(tmp_path, "r1", {})
    with pytest.warns(UserWarning, match=r"W&B stopped \(.*bogus"):
        mirror.show([_record("train_loss", 1.0, round=0)])
    mirror.close()


def test_a_table_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records.jsonl")
    (tmp_path / "metrics.csv").mkdir()  # a folder stands where the file would go
    mirror = CsvMirror(tmp_path)
    _write_and_show(mirror, store, _record("train_loss", 1.0, round=0))
    with pytest.warns(UserWarning, match=r"metrics.csv cannot be written .*records.jsonl is complete"):
        mirror.close()
    store.close()
