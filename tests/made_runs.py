"""Run folders with records and images as a real run leaves them, with numbers chosen by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from gia_bench.metrics import Metrics, evaluate
from gia_bench.records.images import save_images
from gia_bench.records.runs import write_config, write_status
from gia_bench.records.schema import Record
from gia_bench.records.store import RecordStore
from gia_bench.values import Reconstruction, Truth

PSNR = (17.0, 18.0, 19.0)
"""Of the three victims of every attacked update; a defense gets 10 dB less."""


def make_run(
    root: Path,
    run_id: str,
    *,
    defense: str = "none",
    attacks: tuple[str, ...] = ("dlg",),
    seed: int = 0,
    rounds: tuple[int, ...] = (0,),
    settings: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    images: bool = False,
    overrides: list[str] | None = None,
    config: dict[str, Any] | None = None,
    flat: float = 12.0,
    model: str = "lenet",
) -> Path:
    """A finished run with two measured rounds; its client sends 100 of 1,000 bytes under a defense.

    flat: what a flat image scores, dB; settings: of the defense; config: sections that replace those of the config.
    """
    folder = root / "made" / run_id
    whole = {
        "name": "made",
        "seed": seed,
        "defense": settings or {},
        "attack": {name: {"steps": 10} for name in attacks},
        **(config or {}),
    }
    write_config(folder, yaml.safe_dump(whole))
    more: dict[str, Any] = {} if overrides is None else {"overrides": overrides}
    write_status(folder, "running", **more)
    who: dict[str, Any] = {
        "run_id": run_id, "experiment": "made", "seed": seed, "dataset": "digits", "model": model, "fl": "fedsgd",
        "threat": "curious_server", "defense": defense,
    }  # fmt: skip
    lower = 0.0 if defense == "none" else 10.0
    records = []
    for attack in attacks:
        for r in rounds:
            place: dict[str, Any] = {"round": r, "client": 3, "attack": attack}
            for victim, psnr in enumerate(PSNR):
                one = {"victim": victim, **place}
                records.append(Record.of("psnr_db", psnr - lower, **who, **one))
                records.append(Record.of("oracle_flat_psnr_db", flat, **who, **one))
                records.append(Record.of("ssim", 0.5, **who, **one))
                small: dict[str, Any] = {"status": "unavailable", "reason": "images are too small"}
                records.append(Record.of("lpips_squeeze", None, **who, **one, **small))
            records.append(Record.of("label_accuracy", 1.0, **who, **place))
            if images:
                _save_images(folder, r, attack, noise=0.1 if defense == "none" else 0.5)
    for r, accuracy in ((0, 0.1), (9, 0.9 if defense == "none" else 0.85)):
        up = 1000 if defense == "none" else 100
        costs = {"uplink_bytes": up, "dense_uplink_bytes": 1000, "downlink_bytes": 1000, "dense_downlink_bytes": 1000}
        measured = {"test_accuracy": accuracy, **costs, "round_seconds": 0.125}
        records += [Record.of(metric, value, **who, round=r) for metric, value in measured.items()]
    store = RecordStore(folder / "records.jsonl")
    store.append(record for record in records if record.metric not in leave_out)
    store.close()
    write_status(folder, "done")
    return folder


def _save_images(folder: Path, round_index: int, attack: str, noise: float) -> None:
    draw = torch.Generator().manual_seed(round_index)
    private = torch.rand(3, 1, 16, 16, generator=draw)
    guess = private + noise * torch.randn(private.shape, generator=draw)
    truth = Truth(private, torch.tensor([0, 1, 2]))
    reconstruction = Reconstruction(inputs=guess, labels=None, score=0.0)
    scores = evaluate(reconstruction, truth, Metrics(names=["psnr_db"], lpips=None))
    save_images(folder, round_index, 3, attack, reconstruction, truth, scores)
