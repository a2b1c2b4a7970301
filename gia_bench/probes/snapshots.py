"""States of running attacks on disk, so that a killed run goes on mid-attack."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch

from gia_bench.errors import DataError, StorageError
from gia_bench.records.archives import whole


@final
class FileSnapshots:
    """One file per key under ``folder``, replaced atomically and at most every ``seconds``."""

    def __init__(self, folder: Path, prefix: str, seconds: float) -> None:
        self.folder, self.prefix, self.seconds = folder, prefix, seconds
        self._last = time.monotonic()

    def load(self, key: str) -> Mapping[str, Any] | None:
        """The state that was saved last, or None. Raises ``DataError`` for a corrupt file."""
        path = self._path(key)
        if not path.exists():
            return None
        if not whole(path):
            raise DataError(f"The saved state of an attack {path} is corrupt; delete it to start this attack again.")
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def save(self, key: str, state: Mapping[str, Any]) -> None:
        """Write beside, flush, and rename: a kill leaves the old file or the new one."""
        if time.monotonic() - self._last < self.seconds:
            return
        path = self._path(key)
        temporary = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
            raise StorageError(
                f"The attack's state cannot be saved to {path} ({error}). Free some space; the same command goes on "
                "from what was saved before."
            ) from error
        self._last = time.monotonic()

    def clear(self) -> None:
        """Remove this prefix's files, once their attack is recorded."""
        for path in self.folder.glob(f"{self.prefix}*"):
            path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{self.prefix}{key}.pt"
