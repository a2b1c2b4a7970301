"""Clients' states on disk are those in memory, and no kill takes away what a checkpoint refers to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gia_bench.errors import ConfigError, DataError, IncompatibleError
from gia_bench.federated.states import ClientStates, FileStates, MemoryStates, client_states
from gia_bench.seeding import stream
from gia_bench.values import State

CLIENTS = 5


def state(client: int, round_index: int) -> State:
    g = stream(0, client, round_index)
    residual = torch.randn(3, 4, generator=g)
    residual[0, 0] = -0.0
    return {"residual.w": residual, "sent.w": residual > 0, "residual.b": torch.full((), torch.nan).double()}


def play(states: ClientStates, round_index: int) -> None:
    """A round of two clients."""
    cohort = [round_index % CLIENTS, (round_index + 2) % CLIENTS]
    states.commit(round_index, {c: states.keep(c, round_index, state(c, round_index)) for c in cohort})


def bits(states: ClientStates) -> dict[int, dict[str, Tensor]]:
    return {c: {k: v.clone().view(-1).view(torch.uint8) for k, v in own.items()} for c, own in states.items()}


def assert_same(one: dict[int, dict[str, Tensor]], two: dict[int, dict[str, Tensor]]) -> None:
    assert one.keys() == two.keys()
    for client, own in one.items():
        assert own.keys() == two[client].keys()
        assert all(torch.equal(v, two[client][k]) for k, v in own.items())


def test_files_hold_the_bits_that_memory_holds(tmp_path: Path) -> None:
    memory, disk = MemoryStates(), FileStates(tmp_path)
    for round_index in range(12):
        play(memory, round_index)
        play(disk, round_index)
        assert_same(bits(disk), bits(memory))


def test_a_kill_at_any_moment_leaves_what_the_last_whole_checkpoint_refers_to(tmp_path: Path) -> None:
    disk = FileStates(tmp_path)
    whole: tuple[Any, dict[int, dict[str, Tensor]]] = (disk.saved(), {})

    def killed() -> None:
        resumed = FileStates(tmp_path)
        resumed.restore(whole[0])
        assert_same(bits(resumed), whole[1])

    for round_index in range(20):
        play(disk, round_index)
        killed()
        if round_index % 3 == 2:
            started = disk.saved()
            killed()  # while the checkpoint is written, the one before it counts
            whole = (started, bits(disk))
            killed()


def test_a_resumed_run_plays_on_as_if_it_had_never_been_killed_and_removes_what_was_left(tmp_path: Path) -> None:
    memory, disk = MemoryStates(), FileStates(tmp_path)
    for round_index in range(6):
        play(memory, round_index)
        play(disk, round_index)
    saved = disk.saved()
    for round_index in range(6, 9):
        play(disk, round_index)
    disk.keep(0, 9, state(0, 9))
    (tmp_path / "client1.round9.tmp").write_bytes(b"half")
    resumed = FileStates(tmp_path)
    resumed.restore(saved)
    resumed.begin()
    assert len(list(tmp_path.iterdir())) == CLIENTS
    for round_index in range(6, 12):
        play(memory, round_index)
        play(resumed, round_index)
    assert_same(bits(resumed), bits(memory))


def test_no_more_than_two_files_per_client_stay_between_checkpoints(tmp_path: Path) -> None:
    disk = FileStates(tmp_path)
    for round_index in range(40):
        play(disk, round_index)
        assert len(list(tmp_path.iterdir())) <= 2 * CLIENTS
        if round_index % 7 == 6:
            disk.saved()
            disk.saved()  # the end of a run writes twice


def test_a_fresh_start_removes_the_files_of_an_earlier_try(tmp_path: Path) -> None:
    play(FileStates(tmp_path), 0)
    fresh = FileStates(tmp_path)
    fresh.begin()
    assert not list(tmp_path.iterdir()) and not len(fresh)


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-40])], ids=["absent", "cut"])
def test_a_damaged_file_is_named_before_anything_is_played(tmp_path: Path, damage: Any) -> None:
    disk = FileStates(tmp_path)
    play(disk, 0)
    saved = disk.saved()
    damage(tmp_path / "client2.round0.pt")
    with pytest.raises(DataError, match=r"client 2 .*client2\.round0\.pt is absent or corrupt"):
        FileStates(tmp_path).restore(saved)


def test_unknown_storages_and_several_writers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory"):
        client_states("tape", tmp_path, 1)
    with pytest.raises(IncompatibleError, match=r"trainer\.devices=2"):
        client_states("disk", tmp_path, 2)
    assert isinstance(client_states("memory", tmp_path, 2), MemoryStates)
