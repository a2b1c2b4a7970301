"""A mirror shows what the records hold; whatever breaks in it, the run goes on."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gia_bench.records.mirror import CsvMirror, Guarded, Mirror, csv_logger, wandb_logger
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


def test_the_table_can_be_looked_at_while_the_run_goes_on(tmp_path: Path) -> None:
    store, mirror = RecordStore(tmp_path / "records.jsonl"), CsvMirror(tmp_path)
    rows = []
    for r in range(100):
        _write_and_show(mirror, store, _record("train_loss", 1.0, round=r))
        rows.append(len(_table(tmp_path)))
    assert rows[0] == 1
    assert rows == sorted(rows)
    assert 50 < rows[-1] <= 100
    assert len(set(rows)) < 10, "not written again at every call"
    store.close()


def test_a_run_that_recorded_nothing_has_an_empty_table(tmp_path: Path) -> None:
    RecordStore(tmp_path / "records.jsonl").close()
    CsvMirror(tmp_path).close()
    assert (tmp_path / "metrics.csv").read_text() == "round\n"


class Broken:
    """Fails at everything with an error that nobody foresaw."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls: list[str] = []

    def show(self, records: Sequence[Record]) -> None:
        self._fail("show")

    def show_images(self, path: Path, round_index: int) -> None:
        self._fail("show_images")

    def close(self) -> None:
        self._fail("close")

    def _fail(self, call: str) -> None:
        self.calls.append(call)
        raise self.error


class UnforeseenError(Exception):
    pass


@pytest.mark.parametrize("first", ["show", "show_images", "close"])
def test_whatever_a_mirror_raises_is_told_once_and_ends_it(first: str) -> None:
    broken = Broken(UnforeseenError("two\nlines"))
    mirror = Guarded("W&B", broken)
    calls = {
        "show": lambda: mirror.show([]),
        "show_images": lambda: mirror.show_images(Path("a.npz"), 0),
        "close": mirror.close,
    }
    with pytest.warns(UserWarning, match=r"W&B stopped \(UnforeseenError: two lines\); records.jsonl goes on"):
        calls[first]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mirror.show([])
        mirror.show_images(Path("a.npz"), 0)
        mirror.close()
    assert broken.calls == [first, "close"], "what is open is still let go of"


def test_an_interrupt_is_no_broken_mirror() -> None:
    with pytest.raises(KeyboardInterrupt):
        Guarded("W&B", Broken(KeyboardInterrupt())).show([])


def test_images_that_cannot_be_read_end_wandb_alone(tmp_path: Path) -> None:
    mirror = wandb_logger("offline", "project", None)(tmp_path, "r1", {})
    (tmp_path / "cut.npz").write_bytes(b"PK")
    with pytest.warns(UserWarning, match=r"W&B stopped \(.*cut.npz is not a file of saved images"):
        mirror.show_images(tmp_path / "cut.npz", 0)
    mirror.close()


def test_settings_that_wandb_refuses_end_wandb_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    mirror = wandb_logger("offline", "project", None)(tmp_path, "r1", {})
    with pytest.warns(UserWarning, match=r"W&B stopped \(ValidationError: .*bogus"):
        mirror.show([_record("train_loss", 1.0, round=0)])
    mirror.close()


def test_a_table_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records.jsonl")
    (tmp_path / "metrics.csv").mkdir()  # a folder stands where the file would go
    mirror = csv_logger()(tmp_path, "r1", {})
    with pytest.warns(UserWarning, match=r"metrics.csv stopped \(.*cannot be written"):
        _write_and_show(mirror, store, _record("train_loss", 1.0, round=0))
    mirror.close()
    store.close()


def test_the_table_is_replaced_in_one_step(tmp_path: Path) -> None:
    store, mirror = RecordStore(tmp_path / "records.jsonl"), CsvMirror(tmp_path)
    _write_and_show(mirror, store, _record("train_loss", 1.0, round=0))
    before = (tmp_path / "metrics.csv").stat()
    with (tmp_path / "metrics.csv").open() as reader:
        store.append([_record("train_loss", 1.0, round=1)])
        mirror.close()
        assert len(reader.readlines()) == 2, "a reader keeps the whole old file"
    after = (tmp_path / "metrics.csv").stat()
    assert after.st_ino != before.st_ino
    assert stat.S_IMODE(after.st_mode) == 0o666 & ~_umask()
    store.close()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
