"""W&B and CSV mirror what the records hold, offline and without an account; without them nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from command import SMALL, run

RUN = ("gia-bench", *SMALL, "logger=wandb", "fl.attack_rounds=[1]")
SMALL_CSV = ("gia-bench", *SMALL, "logger=csv", "fl.attack_rounds=[1]")


def records(outputs: Path) -> pd.DataFrame:
    [path] = outputs.rglob("records.jsonl")
    frame = pd.read_json(path, lines=True)
    return frame[frame.unit != "s"].reset_index(drop=True)


def break_wandb() -> None:
    import wandb

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise wandb.errors.CommError("no connection")

    wandb.init = refuse  # type: ignore[assignment]


def test_an_offline_run_is_mirrored_and_a_broken_one_loses_no_record(tmp_path: Path) -> None:
    whole = run(*RUN, f"paths.outputs={tmp_path / 'whole'}")
    assert whole.status == 0, whole.err
    [mirrored] = (tmp_path / "whole").rglob("*.wandb")
    content = mirrored.read_bytes()
    for shown in (b"test_accuracy", b"uplink_bytes", b"inverting_gradients_fast/psnr_db", b"leakage"):
        assert shown in content
    assert list((tmp_path / "whole").rglob("media/images/**/*.png"))

    broken = run(*RUN, f"paths.outputs={tmp_path / 'broken'}", before=break_wandb)
    assert broken.status == 0, broken.err
    assert "W&B stopped (no connection)" in broken.err
    pd.testing.assert_frame_equal(records(tmp_path / "broken"), records(tmp_path / "whole"))


def test_settings_that_wandb_refuses_lose_no_record(tmp_path: Path) -> None:
    done = run(*RUN, f"paths.outputs={tmp_path}", environment={"WANDB_MODE": "bogus"})
    assert done.status == 0, done.err
    assert done.err.count("W&B stopped") == 1
    assert (records(tmp_path).metric == "psnr_db").any()


def test_csv_has_one_row_per_round(tmp_path: Path) -> None:
    done = run(*SMALL_CSV, f"paths.outputs={tmp_path}")
    assert done.status == 0, done.err
    [path] = tmp_path.rglob("metrics.csv")
    table = pd.read_csv(path)
    assert list(table["round"]) == [0, 1, 2]
    assert {"test_accuracy", "uplink_bytes", "inverting_gradients_fast/psnr_db"} <= set(table.columns)
