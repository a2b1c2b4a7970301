"""The state of a running attack: found again whole, or named as corrupt."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from gia_bench.errors import DataError
from gia_bench.probes.snapshots import FileSnapshots
from gia_bench.records.archives import whole

STATE = {"step": 7, "candidate": torch.arange(24.0).reshape(2, 3, 4), "best": torch.full((2,), float("inf"))}


@pytest.fixture
def snapshots(tmp_path: Path) -> FileSnapshots:
    return FileSnapshots(tmp_path / "snapshots", "round000001_dlg_", seconds=0)


@pytest.fixture
def path(snapshots: FileSnapshots) -> Path:
    snapshots.save("3", STATE)
    [path] = snapshots.folder.iterdir()
    return path


def test_a_state_comes_back_as_it_was_saved(snapshots: FileSnapshots, path: Path) -> None:
    assert whole(path)
    state = snapshots.load("3")
    assert state is not None
    torch.testing.assert_close(dict(state), STATE)
    assert snapshots.load("4") is None


def test_a_flipped_byte_in_the_middle_is_named_with_what_to_do(snapshots: FileSnapshots, path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(STATE["candidate"].numpy().tobytes())  # type: ignore[attr-defined]
    content[place + 40] ^= 0x20  # still a float: torch.load alone would believe it
    path.write_bytes(content)
    assert torch.load(io.BytesIO(content), weights_only=True)["step"] == 7
    assert not whole(path)
    with pytest.raises(DataError, match=rf"{path.name} is corrupt; delete it to start this attack again\.$"):
        snapshots.load("3")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file_is_named_too(snapshots: FileSnapshots, path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="delete it to start this attack again"):
        snapshots.load("3")


def test_an_archive_of_something_else_is_named_too(snapshots: FileSnapshots, path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    assert not whole(path)
    with pytest.raises(DataError, match="delete it to start this attack again"):
        snapshots.load("3")


def test_no_flipped_byte_goes_unseen_or_ends_in_an_unforeseen_error(snapshots: FileSnapshots, path: Path) -> None:
    content = path.read_bytes()
    named = 0
    for place in range(0, len(content), 3):
        broken = bytearray(content)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        try:
            state = snapshots.load("3")
        except DataError:
            named += 1
            continue
        assert state is not None
        torch.testing.assert_close(dict(state), STATE)  # padding, or a date
    assert named > 100


def test_a_number_that_is_marked_as_a_folder_is_not_believed(snapshots: FileSnapshots, path: Path) -> None:
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))  # in the archive's table of contents
    content[entry + 38] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DataError, match="is corrupt"):
        snapshots.load("3")


def test_every_flipped_byte_of_a_runs_checkpoint_is_seen_or_harmless(tmp_path: Path) -> None:
    path, weights = tmp_path / "round3.ckpt", torch.arange(500.0)
    torch.save({"weights": weights}, path)
    content = path.read_bytes()
    seen = 0
    for place in range(0, len(content), 3):
        broken = bytearray(content)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        if whole(path):
            torch.testing.assert_close(torch.load(path, weights_only=True)["weights"], weights)
        else:
            seen += 1
    assert seen > 600
