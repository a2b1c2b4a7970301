"""The pictures of an attacked update: private images beside what was rebuilt, in one file."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from gia_bench.errors import StorageError
from gia_bench.metrics.evaluate import Scores
from gia_bench.metrics.images import psnr_db, unit_range
from gia_bench.records.runs import write_atomic
from gia_bench.values import Reconstruction, Truth


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ImagePair:
    """truth, reconstruction: [n, C, H, W] in [0, 1], in the same order, NaN where nothing was rebuilt; labels: [n];
    psnr_db: [n], NaN where there is no reconstruction; client: None for the sum over a cohort.
    """

    truth: Tensor
    reconstruction: Tensor
    labels: Tensor
    psnr_db: Tensor
    round: int
    client: int | None
    attack: str


def save_images(
    folder: Path,
    round_index: int,
    client: int | None,
    attack: str,
    reconstruction: Reconstruction,
    truth: Truth,
    scores: Scores,
) -> Path:
    """Write ``images/round<r>_client<c>_<attack>.npz`` in the run's ``folder`` as a whole or not at all; its path.

    The reconstruction is stored in the order of the truth. Raises ``StorageError`` where it cannot be written.
    """
    private = unit_range(truth.inputs)
    rebuilt = (
        scores.aligned(reconstruction.inputs) if reconstruction.failure is None else torch.full_like(private, np.nan)
    )
    content = io.BytesIO()
    np.savez_compressed(
        content,
        truth=private.numpy(),
        reconstruction=rebuilt.numpy(),
        labels=truth.labels.cpu().numpy(),
        psnr_db=psnr_db(rebuilt, private).numpy(),
        place=np.array([round_index, -1 if client is None else client]),
        attack=np.array(attack),
    )
    who = "all" if client is None else f"{client}"
    path = folder / "images" / f"round{round_index:06d}_client{who}_{attack}.npz"
    write_atomic(path, content.getvalue())
    return path


def load_images(path: Path) -> ImagePair:
    """What ``save_images`` wrote. Raises ``StorageError`` for a file that is absent or something else."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        round_index, client = arrays["place"].tolist()
        tensors = {name: torch.from_numpy(arrays[name]) for name in ("truth", "reconstruction", "labels", "psnr_db")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        raise StorageError(f"{path} is not a file of saved images ({problem}).") from problem
    return ImagePair(**tensors, round=round_index, client=None if client < 0 else client, attack=str(arrays["attack"]))
