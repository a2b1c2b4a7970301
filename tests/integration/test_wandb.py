"""W&B mirrors what the records hold, offline and without an account; without it nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from command import SMALL, run

RUN = ("gia-bench", *SMALL, "logger=wandb", "fl.attack_rounds=[1]")


def records(outputs: Path) -> pd.DataFrame:
    [path] = outputs.rglob("records.jsonl")
    frame = pd.read_json(path, lines=True)
    return frame[frame.unit != "s"].reset_index(drop=True)


def break_wandb() -> None:
    import wandb

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise wandb.errors.CommError("no connection")

    wandb.init = refuse


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
