from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_formats import write_femnist

from gia_bench.data.femnist import femnist
from gia_bench.data.partition import ByWriter
from gia_bench.errors import DataError

TRAIN = {"f0001_41": [3, 61], "f0000_14": [0, 5, 7]}
TEST = {"f0000_14": [1], "f0002_10": [2]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_femnist(tmp_path / "femnist", TRAIN, TEST)
    return tmp_path


def test_every_image_keeps_its_pixels_label_and_writer(root: Path) -> None:
    data = femnist(root=str(root))
    assert (data.num_classes, data.shape) == (62, (1, 28, 28))
    assert data.train.labels.tolist() == [3, 61, 0, 5, 7]
    assert data.train.groups is not None
    assert data.test.groups is not None
    assert data.train.groups.tolist() == [1, 1, 0, 0, 0]
    assert data.test.groups.tolist() == [0, 2]
    # write_femnist paints each image in the grey of its label
    torch.testing.assert_close(data.train.images(torch.arange(5))[:, 0, 9, 9] * 255, data.train.labels.float())


def test_each_writer_becomes_a_client(root: Path) -> None:
    data = femnist(root=str(root))
    clients = ByWriter().split(data.train.labels, data.train.groups, seed=0).clients
    assert [client.tolist() for client in clients] == [[2, 3, 4], [0, 1]]


def test_absent_files_are_told_with_folder_format_and_address(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"femnist is not in .*train/\*\.json.*https://github\.com/TalwalkarLab/leaf"):
        femnist(root=str(tmp_path))


def broken(content: dict[str, Any], how: str) -> str:
    user = content["user_data"]["f0001_41"]
    if how == "cut off":
        return json.dumps(content)[:-40]
    if how == "no users":
        del content["users"]
    elif how == "a pixel too few":
        user["x"][0] = user["x"][0][:-1]
    elif how == "a label too few":
        user["y"] = user["y"][:-1]
    elif how == "a pixel above 1":
        user["x"][0][5] = 255
    return json.dumps(content)


@pytest.mark.parametrize("how", ["cut off", "no users", "a pixel too few", "a label too few", "a pixel above 1"])
def test_a_broken_file_is_named(root: Path, how: str) -> None:
    path = root / "femnist" / "train" / "all_data_0_niid_0_keep_0.json"
    path.write_text(broken(json.loads(path.read_text()), how))
    with pytest.raises(DataError, match=rf"{path.name} is corrupt or not in LEAF's format"):
        femnist(root=str(root))
