"""Every file in conf/ composes, and every key in it is an argument of what it builds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from gia_bench.conf_path import CONF
from gia_bench.models.build import build_victim
from gia_bench.signatures import signature_of

FILES = sorted(CONF.rglob("*.yaml"))
GROUPS = sorted((p.parent.relative_to(CONF).as_posix(), p.stem) for p in FILES if p.parent != CONF)
REPORT = ("table", "figure")
# choices whose plugin is an extra: (what Hydra calls the launcher, the plugin's module)
PLUGINS = {
    ("launcher", "slurm"): ("submitit_slurm", "hydra_plugins.hydra_submitit_launcher"),
    ("launcher", "ray"): ("ray", "hydra_plugins.hydra_ray_launcher"),
}
EXPECTED = {
    "dataset", "partition", "model", "fl", "threat", "attack", "defense", "pruning", "trainer", "logger", "launcher",
    "experiment", "aggregation", "metrics", "table", "figure", "paths",
}  # fmt: skip
NOT_ARGUMENTS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def composed(config: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose(config_name=config, overrides=list(overrides))


def nodes(value: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a ``_target_``, however deep."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield where, value
        for key, inner in value.items():
            yield from nodes(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from nodes(inner, f"{where}[{index}]")


def bind(where: str, node: dict[str, Any]) -> None:
    target = get_object(node["_target_"])
    arguments = {k: v for k, v in node.items() if k not in NOT_ARGUMENTS}
    signature = signature_of(target)
    try:
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**arguments)
    except TypeError as error:
        raise AssertionError(f"{where} ({node['_target_']}): {error}") from error


def test_the_groups_are_those_the_documentation_names() -> None:
    assert GROUPS
    assert {group for group, _ in GROUPS} == EXPECTED


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_choice_composes_and_binds(group: str, choice: str) -> None:
    launcher, module = PLUGINS.get((group, choice), (None, None))
    if module and not (find_spec("hydra_plugins") and find_spec(module)):
        with pytest.raises(ConfigCompositionException, match=f"Could not find 'hydra/launcher/{launcher}'"):
            composed("config", f"{group}={choice}")
        return
    override = f"{group}=[{choice}]" if group in ("attack", "figure") else f"{group}={choice}"
    cfg = composed("report" if group in REPORT else "config", override)
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    found = list(nodes(plain))
    assert found
    for where, node in found:
        bind(where, node)
    if group not in REPORT:
        known = set(inspect.signature(build_victim).parameters)
        assert set(plain["model"]) <= known, "a key of the model group that nobody reads"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONF).as_posix())
def test_every_file_says_in_words_what_it_is(path: Path) -> None:
    assert "#" in path.read_text()


def test_several_attacks_can_be_chosen_at_once() -> None:
    cfg = composed("config", "attack=[dlg,inverting_gradients_fast]", "attack.dlg.steps=7")
    assert set(cfg.attack) == {"dlg", "inverting_gradients_fast"}
    assert cfg.attack.dlg.steps == 7
    assert set(composed("config", "attack=idlg").attack) == {"idlg"}


def test_a_preset_of_fl_chooses_its_partition_and_can_be_overridden() -> None:
    cfg = composed("config", "fl=graddefense_mnist")
    assert cfg.partition.classes_per_client == 2 and cfg.fl.local.epochs == 2
    cfg = composed("config", "fl=dgp_paper", "partition=dirichlet", "fl.local.batch_size=4")
    assert "alpha" in cfg.partition and cfg.fl.local.batch_size == 4 and cfg.fl.server.optimizer.momentum == 0.9
