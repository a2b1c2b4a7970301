from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from gia_bench.data.digits import digits

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted([*(CONF / "dataset").glob("*.yaml"), *(CONF / "partition").glob("*.yaml")])


def composed(path: Path, root: str = "/somewhere") -> dict[str, Any]:
    whole = OmegaConf.create({"paths": {"data": root}, "here": OmegaConf.load(path)})
    resolved = OmegaConf.to_container(whole, resolve=True)
    assert isinstance(resolved, dict)
    return dict(resolved["here"])


def test_every_dataset_and_partition_of_the_issue_has_its_file() -> None:
    expected = {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "femnist", "tiny_imagenet"}
    expected |= {"image_folder", "iid", "dirichlet", "classes_per_client", "by_writer"}
    assert expected <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_spells_exactly_its_targets_arguments_and_defaults(path: Path) -> None:
    settings = composed(path)
    target = inspect.signature(get_object(settings.pop("_target_")))
    assert set(settings) == set(target.parameters)
    for name, parameter in target.parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert settings[name] == default, name


@pytest.mark.parametrize("path", sorted((CONF / "partition").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_partition_is_made_from_its_file(path: Path) -> None:
    scheme = instantiate(composed(path), _convert_="all")
    assert callable(scheme.split)


def test_the_default_dataset_is_made_from_its_file() -> None:
    made = instantiate(composed(CONF / "dataset" / "digits.yaml"), _convert_="all")
    assert made.version == digits().version
