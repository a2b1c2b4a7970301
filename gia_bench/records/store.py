"""``records.jsonl``: whole lines or none, on the disk when ``append`` returns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import final

import pandas as pd

from gia_bench.errors import StorageError
from gia_bench.records.schema import KEYS, Record

_INTEGERS = ("seed", "round", "client", "victim")


@final
class RecordStore:
    """Appends records to one file and tells how long it is, so that a checkpoint can say what it has seen.

    A line that a killed writer left unfinished is cut off when the store opens. Every method raises ``StorageError``
    with the file and the cause where the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: what was written is known exactly when a write fails
            self._file = path.open("ab", buffering=0)
            self._cut(_end_of_last_line(path))
        except OSError as problem:
            raise self._error("cannot be opened for writing", problem) from problem

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Path]]:
        """Another process opens the file itself."""
        return RecordStore, (self.path,)

    @property
    def offset(self) -> int:
        """Bytes in the file now, those of other processes included."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, records: Iterable[Record]) -> None:
        """Write one line per record and wait for the disk. Where that fails, the file keeps the earlier lines alone."""
        lines = "".join(record.to_json() + "\n" for record in records).encode()
        before = self.offset
        try:
            unwritten = memoryview(lines)
            while unwritten:
                unwritten = unwritten[os.write(self._file.fileno(), unwritten) :]
            os.fsync(self._file.fileno())
        except OSError as problem:
            self._cut(before)
            raise self._error("cannot take more records; those before are intact", problem) from problem

    def truncate(self, offset: int) -> None:
        """Drop everything after ``offset``, an earlier value of ``self.offset``: what a checkpoint has not seen."""
        with self.path.open("rb") as file:
            file.seek(max(offset - 1, 0))
            on_boundary = offset == 0 or file.read(1) == b"\n"
        if not on_boundary or offset > self.offset:
            raise StorageError(
                f"{self.path} has {self.offset} bytes and no line ends at byte {offset}, where the checkpoint stands: "
                "it is not the file of that checkpoint. Start the run again with force=true."
            )
        try:
            self._cut(offset)
        except OSError as problem:
            raise self._error("cannot be shortened", problem) from problem

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _cut(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)

    def _error(self, what: str, problem: OSError) -> StorageError:
        return StorageError(
            f"{self.path} {what} ({problem.strerror}). Free some space or choose another folder with paths.outputs=..."
            ", then start the same command again: it goes on where it stopped."
        )


def read(paths: Path | Iterable[Path]) -> pd.DataFrame:
    """All records of one file or several as one table, with the record's keys as columns.

    Whole numbers are nullable integers. An unfinished last line, of a run that is still writing, is left out; any other
    line that is no record raises ``StorageError`` with its number. A single file can be read without gia_bench too:
    ``pandas.read_json(path, lines=True)``.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    rows = [row for path in files for row in _rows(path)]
    table = pd.DataFrame(rows, columns=list(KEYS))
    return table.astype({"value": "float64", **dict.fromkeys(_INTEGERS, "Int64")})


def _rows(path: Path) -> list[dict[str, object]]:
    try:
        lines = path.read_bytes()[: _end_of_last_line(path)].splitlines()
    except OSError as problem:
        raise StorageError(f"{path} cannot be read ({problem.strerror}).") from problem
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise StorageError(
                f"{path} line {number} is not JSON ({problem}). Start its run with force=true."
            ) from problem
        if not isinstance(row, dict) or tuple(row) != KEYS:
            raise StorageError(
                f"{path} line {number} is not a record of this version: its keys are not {', '.join(KEYS)}."
            )
        rows.append(row)
    return rows


def _end_of_last_line(path: Path) -> int:
    """The length of the part that consists of whole lines."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
    return 0
