"""A run's folder: ``config.yaml``, ``status.json``, ``records.jsonl``, ``images/``."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import yaml

from gia_bench.errors import StorageError

LOCK = ".lock"
State: TypeAlias = Literal["running", "done", "failed", "skipped"]


@final
@dataclass(frozen=True)
class Run:
    """One folder ``outputs/<experiment>/<run_id>``; what is in it is read when it is asked for."""

    folder: Path

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def records(self) -> Path:
        """``records.jsonl``, which may not exist yet."""
        return self.folder / "records.jsonl"

    @property
    def images(self) -> list[Path]:
        """The saved images, by round."""
        return sorted((self.folder / "images").glob("*.npz"))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The resolved config, empty where there is no ``config.yaml``."""
        path = self.folder / "config.yaml"
        return yaml.safe_load(_read(path)) or {} if path.exists() else {}

    @cached_property
    def status(self) -> Mapping[str, Any]:
        """All of ``status.json``, empty where there is none."""
        return _status(self.folder)


def find_runs(folders: Path | Iterable[Path]) -> list[Run]:
    """All runs in or below ``folders``, sorted by path. Raises ``StorageError`` for a folder that is absent."""
    found: set[Path] = set()
    for folder in [folders] if isinstance(folders, Path) else folders:
        if not folder.is_dir():
            raise StorageError(f"{folder} is not a folder with runs. Start one with gia-bench, or set runs=...")
        found |= {path.parent for path in folder.rglob("status.json")}
    return [Run(path) for path in sorted(found)]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works on this run meanwhile; a killed process lets go by itself. Raises ``StorageError``."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise StorageError(
                f"{folder} is being written by another process. Wait for it, or set another seed or name."
            ) from problem
        yield


def write_config(folder: Path, text: str) -> None:
    """Replace ``config.yaml`` by ``text``, the resolved config as YAML."""
    write_atomic(folder / "config.yaml", text.encode())


def write_status(folder: Path, state: State, reason: str | None = None, **more: Any) -> None:
    """Set ``state`` and ``reason`` in ``status.json``. ``more``: what JSON can hold; it stays when the state changes.

    ``overrides=[...]``, the run's words on the command line, lets a report name the exact command for a missing cell.
    """
    content = {**_status(folder), "state": state, "reason": reason, **more}
    write_atomic(folder / "status.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode())


def read_status(folder: Path) -> State | None:
    """The state, or None for a run that never started. Raises ``StorageError`` for a file that is no status."""
    state: State | None = _status(folder).get("state")
    return state


def _status(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    if not path.exists():
        return {}
    try:
        status = json.loads(_read(path))
    except ValueError as problem:
        raise StorageError(
            f"{path} is not JSON ({problem}). Delete it; its run then goes on where it stopped."
        ) from problem
    if not isinstance(status, dict) or "state" not in status:
        raise StorageError(f"{path} names no state. Delete it; its run then goes on where it stopped.")
    return status


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: a kill or a full disk leaves the old file or the new one, never a part.

    Creates the folder. Raises ``StorageError`` where that cannot be done.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as problem:
        raise StorageError(
            f"{path} cannot be written ({problem.strerror}). Free some space or choose another folder with "
            "paths.outputs=..., then start the same command again."
        ) from problem


def _sync_folder(folder: Path) -> None:
    """The new name itself survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise StorageError(f"{path} cannot be read ({problem}).") from problem
