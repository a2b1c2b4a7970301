"""Where the clients' states (residuals of error feedback) live between rounds: in memory, or in files."""

from __future__ import annotations

import os
import pickle
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch

from gia_bench.errors import ConfigError, DataError, IncompatibleError, StorageError, choices
from gia_bench.records.archives import whole
from gia_bench.values import State

STORAGES = ("memory", "disk")


class ClientStates(Mapping[int, State]):
    """The states by client number; a client has none before its first round."""

    @abstractmethod
    def keep(self, client: int, round_index: int, state: State) -> State:
        """A client's next state, as it is held from now on; it only counts once the round is committed."""

    @abstractmethod
    def commit(self, round_index: int, states: Mapping[int, State]) -> None:
        """What ``keep`` returned for a round's clients replaces what they had before."""

    @abstractmethod
    def saved(self) -> Any:
        """What a checkpoint holds of them. A kill while it is written must not harm what an older one refers to."""

    @abstractmethod
    def restore(self, saved: Any) -> None:
        """Back to what a checkpoint holds. Raises ``DataError`` where it cannot be read."""

    @abstractmethod
    def begin(self) -> None:
        """Called before the first round of a process: what an earlier one left behind is removed."""


@final
class MemoryStates(ClientStates):
    """On the host, and all of them in every checkpoint."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def __getitem__(self, client: int) -> State:
        return self._states[client]

    def __iter__(self) -> Iterator[int]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def keep(self, client: int, round_index: int, state: State) -> State:
        """The state itself."""
        return state

    def commit(self, round_index: int, states: Mapping[int, State]) -> None:
        """All at once."""
        self._states |= states

    def saved(self) -> Any:
        """The states."""
        return dict(self._states)

    def restore(self, saved: Any) -> None:
        """The states."""
        self._states = dict(saved)

    def begin(self) -> None:
        """Nothing outlives a process."""


@final
class FileStates(ClientStates):
    """One file ``client<c>.round<r>.pt`` below ``folder`` for every client and the round that its state comes from,
    mapped into memory while it is read.

    A file never changes once it has its name. A checkpoint holds which round's file is each client's; files that it
    refers to are removed after the next checkpoint is written, so a kill at any moment leaves all that a resumed run
    reads. At most two states per client lie on the disk between checkpoints, three while one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rounds: dict[int, int] = {}
        self._checkpoint: set[tuple[int, int]] = set()
        self._older: set[tuple[int, int]] = set()

    def __getitem__(self, client: int) -> State:
        return self._read(client, self._rounds[client])

    def __iter__(self) -> Iterator[int]:
        return iter(self._rounds)

    def __len__(self) -> int:
        return len(self._rounds)

    def keep(self, client: int, round_index: int, state: State) -> State:
        """Written beside and renamed, then mapped from the file. Raises ``StorageError`` where that fails."""
        path = self._path(client, round_index)
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
                f"The state of client {client} cannot be written to {path} ({error}). Free some space, or keep the "
                "states in memory with fl.client_states=memory."
            ) from error
        return self._read(client, round_index)

    def commit(self, round_index: int, states: Mapping[int, State]) -> None:
        """Their files count from now on."""
        before = {(client, self._rounds[client]) for client in states if client in self._rounds}
        self._rounds |= dict.fromkeys(states, round_index)
        # a round after a checkpoint: it stands, so what the one before it referred to can go
        gone, self._older = (before | self._older) - self._checkpoint - set(self._rounds.items()), set()
        for client, last in gone:
            self._path(client, last).unlink(missing_ok=True)

    def saved(self) -> Any:
        """The round of each client's file."""
        self._older |= self._checkpoint
        self._checkpoint = set(self._rounds.items())
        return dict(self._rounds)

    def restore(self, saved: Any) -> None:
        """The rounds, after a look at every file."""
        self._rounds = dict(saved)
        self._checkpoint, self._older = set(self._rounds.items()), set()
        for client, last in self._rounds.items():
            if not whole(self._path(client, last)):
                raise self._unreadable(client, last)

    def begin(self) -> None:
        """Files of rounds that no checkpoint knows are removed."""
        known = {self._path(client, last) for client, last in self._rounds.items()}
        for path in self.folder.glob("client*.round*"):
            if path not in known:
                path.unlink()

    def _path(self, client: int, round_index: int) -> Path:
        return self.folder / f"client{client}.round{round_index}.pt"

    def _read(self, client: int, round_index: int) -> State:
        path = self._path(client, round_index)
        try:
            state: State = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise self._unreadable(client, round_index) from error
        return state

    def _unreadable(self, client: int, round_index: int) -> DataError:
        return DataError(
            f"The state of client {client} in {self._path(client, round_index)} is absent or corrupt; start again with "
            "force=true."
        )


def client_states(storage: str, folder: Path, processes: int) -> ClientStates:
    """The ``storage`` of that name. Raises ``ConfigError`` for an unknown one, and ``IncompatibleError`` for files
    that several processes would write.
    """
    check_storage(storage)
    if storage == "memory":
        return MemoryStates()
    if processes != 1:
        raise IncompatibleError(
            f"fl.client_states=disk writes one file per client from one process, but trainer.devices={processes}; use "
            "trainer.devices=1, or fl.client_states=memory."
        )
    return FileStates(folder)


def check_storage(storage: str) -> None:
    """Raises ``ConfigError`` for a storage that does not exist."""
    if storage not in STORAGES:
        raise ConfigError(choices("fl.client_states", storage, STORAGES))
