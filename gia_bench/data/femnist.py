"""FEMNIST by writer, from the JSON files that LEAF's own script prepares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gia_bench.data.source import Dataset, InMemory, fingerprint, per_channel
from gia_bench.errors import DataError

NUM_CLASSES = 62
PIXELS = 28 * 28
LEAF = "https://github.com/TalwalkarLab/leaf"


class _Writer(NamedTuple):
    name: str
    pixels: NDArray[np.uint8]  # [n, 784]
    labels: NDArray[np.int64]  # [n]


def femnist(
    *, root: str, folder: str = "femnist", mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
) -> Dataset:
    """Handwritten characters, 28x28, 62 classes (0-9, A-Z, a-z), with the writer of each as its group.

    folder: below ``root``, holding LEAF's ``train/*.json`` and ``test/*.json``. LEAF stores grey values divided by
    255, so they are kept as uint8 without loss; as in LEAF paper is white (1) and ink black (0), the opposite of
    MNIST. Groups number the writers of both splits in the order of their names. Raises ``DataError`` where files are
    absent or not in LEAF's format. Source: Caldas et al. 2018 (LEAF); not normalised there.
    """
    base = Path(root).expanduser() / folder
    train, test = (_read(base, split) for split in ("train", "test"))
    names = sorted({writer.name for writer in (*train, *test)})
    group = {name: index for index, name in enumerate(names)}
    sources = [_source(writers, group) for writers in (train, test)]
    return Dataset(
        name="femnist",
        train=sources[0],
        test=sources[1],
        num_classes=NUM_CLASSES,
        shape=sources[0].shape,
        mean=per_channel(mean, 1),
        std=per_channel(std, 1),
        version=fingerprint(*sources),
    )


def _read(base: Path, split: str) -> list[_Writer]:
    paths = sorted((base / split).glob("*.json"))
    if not paths:
        raise DataError(
            f"femnist is not in {base}; expected there: train/*.json and test/*.json in LEAF's format. Clone {LEAF}, "
            "run data/femnist/preprocess.sh -s niid --sf 0.05 -k 0 -t sample, and copy the folders "
            f"data/femnist/data/train and data/femnist/data/test into {base}."
        )
    return [writer for path in paths for writer in _writers(path)]


def _writers(path: Path) -> list[_Writer]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [_writer(name, content["user_data"][name]) for name in content["users"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise DataError(
            f"femnist: {path} is corrupt or not in LEAF's format, users and user_data with x and y for each "
            f"({type(e).__name__}: {e}); prepare it again with the script of {LEAF}."
        ) from e


def _writer(name: str, data: dict[str, Any]) -> _Writer:
    values = np.asarray(data["x"], dtype=np.float64).reshape(-1, PIXELS)
    labels = np.asarray(data["y"], dtype=np.int64)
    if labels.shape != (len(values),):
        raise ValueError(f"writer {name} has {labels.size} labels for {len(values)} images")
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"writer {name} has pixels outside [0, 1]")
    return _Writer(name, np.rint(values * 255).astype(np.uint8), labels)


def _source(writers: list[_Writer], group: dict[str, int]) -> InMemory:
    pixels = torch.from_numpy(np.concatenate([w.pixels for w in writers]))
    labels = torch.from_numpy(np.concatenate([w.labels for w in writers]))
    groups = torch.cat([torch.full((len(w.labels),), group[w.name], dtype=torch.int64) for w in writers])
    return InMemory(pixels.view(-1, 1, 28, 28), labels, groups)
