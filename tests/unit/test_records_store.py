from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gia_bench.errors import StorageError
from gia_bench.records.schema import KEYS, Record
from gia_bench.records.store import RecordStore, read

WHO: dict[str, Any] = {
    "run_id": "r1", "experiment": "demo", "seed": 0, "dataset": "digits", "model": "lenet", "fl": "fedsgd",
    "threat": "curious_server", "defense": "none",
}  # fmt: skip


def _records(n: int, **more: Any) -> list[Record]:
    return [Record.of("psnr_db", 10.0 + i, **WHO, round=0, victim=i, attack="dlg", **more) for i in range(n)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run" / "records.jsonl"


@pytest.fixture
def store(path: Path) -> Iterator[RecordStore]:
    store = RecordStore(path)
    yield store
    store.close()


def test_what_is_appended_is_on_the_disk_at_once_one_line_each(store: RecordStore, path: Path) -> None:
    store.append(_records(3))
    assert path.read_text().splitlines() == [record.to_json() for record in _records(3)]
    store.append([])
    assert store.offset == path.stat().st_size


def test_a_line_that_a_killed_writer_left_is_cut_off(path: Path) -> None:
    first = RecordStore(path)
    first.append(_records(2))
    first.close()
    whole = path.read_bytes()
    for torn in (whole + b'{"run_id": "r1", "exp', whole[:-1]):
        path.write_bytes(torn)
        again = RecordStore(path)
        expected = whole[: whole[:-1].rfind(b"\n") + 1] if torn == whole[:-1] else whole
        assert path.read_bytes() == expected
        assert again.offset == len(expected)
        again.close()


def test_a_file_that_is_nothing_but_a_torn_line_becomes_empty(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 200_000)
    store = RecordStore(path)
    assert store.offset == path.stat().st_size == 0
    store.close()


def test_a_resumed_run_drops_what_its_checkpoint_has_not_seen(store: RecordStore, path: Path) -> None:
    store.append(_records(2))
    seen = store.offset
    store.append(_records(5))
    store.truncate(seen)
    store.append(_records(1))
    assert path.read_text().splitlines() == [record.to_json() for record in _records(2) + _records(1)]
    store.truncate(0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("wrong", [-10, 10, 10**6])
def test_a_checkpoint_of_another_file_is_refused(store: RecordStore, path: Path, wrong: int) -> None:
    store.append(_records(2))
    offset = store.offset + wrong if wrong < 0 else wrong
    with pytest.raises(StorageError, match=r"not the file of that checkpoint.*force=true"):
        store.truncate(offset)
    assert len(path.read_text().splitlines()) == 2


def test_a_full_disk_is_a_sentence_and_leaves_the_earlier_lines_whole(
    store: RecordStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append(_records(2))
    before = path.read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        answers = iter([7])  # seven bytes still fit

        def full(handle: int, data: bytes) -> int:
            for room in answers:
                return write(handle, bytes(data[:room]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match=r"records.jsonl .*No space left on device.*paths.outputs"):
            store.append(_records(3))
    assert path.read_bytes() == before
    store.append(_records(1))
    assert len(path.read_text().splitlines()) == 3


def test_what_another_process_appended_counts_and_a_full_disk_does_not_take_it_away(
    store: RecordStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append(_records(2))
    other = RecordStore(path)
    other.append(_records(3))
    other.close()
    before = path.read_bytes()
    assert store.offset == len(before)

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="those before are intact"):
            store.append(_records(1))
    assert path.read_bytes() == before
    store.append(_records(1))
    assert len(path.read_text().splitlines()) == 6
    store.truncate(len(before))
    assert path.read_bytes() == before


def test_a_real_limit_on_the_files_size_does_the_same(store: RecordStore, path: Path) -> None:
    store.append(_records(2))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(StorageError, match="those before are intact"):
            store.append(_records(50))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot be opened for writing.*paths\.outputs"):
        RecordStore(tmp_path / "file" / "records.jsonl")


def test_a_write_that_the_system_splits_is_completed(
    store: RecordStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data[:5])))
    store.append(_records(2))
    assert path.read_text().splitlines() == [record.to_json() for record in _records(2)]


def test_pandas_reads_the_file_in_one_call(store: RecordStore, path: Path) -> None:
    accuracy = Record.of("test_accuracy", 0.5, **WHO, round=1)
    absent = Record.of("ssim", None, **WHO, attack="dlg", status="unavailable", reason="too small")
    store.append([*_records(3), accuracy, absent])
    table = pd.read_json(path, lines=True)
    assert list(table.columns) == list(KEYS)
    assert table["value"].tolist()[:4] == [10.0, 11.0, 12.0, 0.5]
    assert table["run_id"].tolist() == ["r1"] * 5
    assert table["value"].isna().tolist() == [False] * 4 + [True]
    assert table["client"].isna().all()
    assert table.groupby("metric")["value"].median()["psnr_db"] == 11.0


def test_our_own_reader_keeps_whole_numbers_whole_and_joins_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        store = RecordStore(tmp_path / name / "records.jsonl")
        store.append([*_records(2), Record.of("test_accuracy", 0.5, **WHO, round=1)])
        store.close()
    table = read(sorted(tmp_path.glob("*/records.jsonl")))
    assert len(table) == 6
    assert str(table["victim"].dtype) == str(table["client"].dtype) == "Int64"
    assert table["victim"].tolist()[:2] == [0, 1]
    pd.testing.assert_frame_equal(table.iloc[:3], read(tmp_path / "a" / "records.jsonl"))


def test_a_run_that_is_still_writing_can_be_read(store: RecordStore, path: Path) -> None:
    store.append(_records(2))
    with path.open("ab") as file:
        file.write(b'{"run_id": "r1", ')
    assert len(read(path)) == 2


def test_no_records_are_an_empty_table_with_all_columns(path: Path, store: RecordStore) -> None:
    assert list(read(path).columns) == list(KEYS)
    assert read(path).empty


@pytest.mark.parametrize(
    ("line", "sentence"), [("{broken", "line 3 is not JSON"), ('{"a": 1}', "line 3 is not a record")]
)
def test_a_line_that_is_no_record_is_named(store: RecordStore, path: Path, line: str, sentence: str) -> None:
    store.append(_records(2))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StorageError, match=sentence):
        read(path)


def test_a_file_that_is_absent_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read(tmp_path / "absent.jsonl")
