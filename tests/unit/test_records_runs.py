from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gia_bench.errors import StorageError
from gia_bench.metrics import Metrics, evaluate
from gia_bench.records.images import load_images, save_images
from gia_bench.records.runs import Run, find_runs, read_status, write_atomic, write_config, write_status
from gia_bench.values import Reconstruction, Truth


def test_a_status_says_what_was_written_last_and_keeps_what_came_with_it(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running", overrides=["seed=1"])
    write_status(tmp_path, "failed", "the disk is full")
    assert read_status(tmp_path) == "failed"
    assert Run(tmp_path).status == {"state": "failed", "reason": "the disk is full", "overrides": ["seed=1"]}
    write_status(tmp_path, "done")
    assert Run(tmp_path).status["reason"] is None


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_status_that_is_none_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(StorageError, match="Delete it"):
        read_status(tmp_path)


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    for name in ("b/r2", "a/r1", "a/sweep/r3"):
        write_status(tmp_path / name, "done")
    (tmp_path / "a" / "no_run").mkdir()
    found = find_runs([tmp_path, tmp_path / "a"])
    assert [run.run_id for run in found] == ["r1", "r3", "r2"]
    assert find_runs(tmp_path) == found


def test_a_folder_that_is_absent_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not a folder with runs"):
        find_runs(tmp_path / "absent")


def test_a_run_reads_its_config(tmp_path: Path) -> None:
    assert Run(tmp_path).config == {}
    write_config(tmp_path, "defense:\n  k1: 0.05\n")
    assert Run(tmp_path).config == {"defense": {"k1": 0.05}}
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(StorageError, match="cannot be read"):
        _ = Run(tmp_path).config


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "file", b"old")

    def refuse(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match=r"file cannot be written \(No space left on device\)"):
            write_atomic(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_atomic_file_can_be_read_by_whoever_may_read_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def _scored(guess: torch.Tensor, truth: Truth, failure: str | None = None) -> tuple[Reconstruction, Truth, object]:
    reconstruction = Reconstruction(inputs=guess, labels=None, score=0.0, failure=failure)
    return reconstruction, truth, evaluate(reconstruction, truth, Metrics(names=["psnr_db"], lpips=None))


def test_saved_pictures_come_back_in_the_order_of_the_truth(tmp_path: Path) -> None:
    truth = Truth(torch.rand(3, 3, 8, 8), torch.tensor([4, 5, 6]))
    path = save_images(tmp_path, 10, 3, "dlg", *_scored(truth.inputs[[1, 2, 0]], truth))  # type: ignore[arg-type]
    assert path == tmp_path / "images" / "round000010_client3_dlg.npz"
    pair = load_images(path)
    assert torch.equal(pair.truth, truth.inputs)
    assert torch.equal(pair.reconstruction, truth.inputs)
    assert pair.labels.tolist() == [4, 5, 6]
    assert pair.psnr_db.tolist() == [100, 100, 100]
    assert (pair.round, pair.client, pair.attack) == (10, 3, "dlg")
    assert Run(tmp_path).images == [path]


def test_an_image_that_was_not_rebuilt_is_nan_in_the_file(tmp_path: Path) -> None:
    truth = Truth(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    partly = load_images(save_images(tmp_path, 0, None, "dlg", *_scored(truth.inputs[1:], truth)))  # type: ignore[arg-type]
    assert partly.client is None
    assert partly.reconstruction.isnan().flatten(1).all(1).tolist() == [True, False]
    assert partly.psnr_db.isnan().tolist() == [True, False]
    failed = _scored(torch.zeros(0, 1, 8, 8), truth, failure="diverged")
    assert load_images(save_images(tmp_path, 1, 0, "dlg", *failed)).reconstruction.isnan().all()  # type: ignore[arg-type]


def test_another_file_is_not_taken_for_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    for name in ("text.npz", "other.npz", "absent.npz"):
        with pytest.raises(StorageError, match=f"{name} is not a file of saved images"):
            load_images(tmp_path / name)
