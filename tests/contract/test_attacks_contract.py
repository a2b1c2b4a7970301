"""What every attack in conf/attack keeps, whatever it is."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attack_problems import problem
from hydra.utils import instantiate
from omegaconf import OmegaConf

from gia_bench.attacks.base import Attack
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.idlg import idlg
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.matching import GradientMatching
from gia_bench.conf_path import CONF
from gia_bench.threat import Knowledge, Power

FILES = sorted((CONF / "attack").glob("*.yaml"))


def built(file: Path) -> Attack:
    attack = instantiate(OmegaConf.load(file), _convert_="all")
    assert isinstance(attack, Attack)
    return attack


def short(file: Path) -> Attack:
    attack = built(file)
    return dataclasses.replace(attack, steps=2) if isinstance(attack, GradientMatching) else attack


def test_there_are_attacks() -> None:
    assert {"dlg", "idlg", "inverting_gradients", "inverting_gradients_fast"} <= {f.stem for f in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_file_is_packaged_under_its_own_name_so_that_several_can_be_chosen(file: Path) -> None:
    assert file.read_text().startswith(f"# @package attack.{file.stem}\n")


@pytest.mark.parametrize("preset", [dlg, idlg, inverting_gradients], ids=lambda f: f.__name__)
def test_the_file_of_a_paper_and_its_function_have_the_same_defaults(preset: Callable[[], Attack]) -> None:
    assert built(CONF / "attack" / f"{preset.__name__}.yaml") == preset()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_attack_returns_one_finite_reconstruction_per_observation_in_order(file: Path) -> None:
    p, attack = problem(2, dtype=torch.float64), short(file)
    assert not attack.requires & ~Knowledge.NUM_EXAMPLES
    assert attack.needs == Power.NONE
    before = pickle.dumps([o.update for o in p.observations])
    found = attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    assert len(found) == 2
    for r in found:
        assert r.inputs.shape == (1, 1, 8, 8)
        assert r.inputs.isfinite().all()
        assert not r.inputs.requires_grad
        assert r.labels is not None
        assert r.labels.dtype == torch.int64
        assert r.failure is None
    assert pickle.dumps([o.update for o in p.observations]) == before


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_attack_travels_to_another_process_and_reads_the_same(file: Path) -> None:
    attack = built(file)
    assert repr(pickle.loads(pickle.dumps(attack))) == repr(attack)
    assert " at 0x" not in repr(attack), "snapshots are found by this text"


def test_no_observation_gives_no_reconstruction() -> None:
    assert dlg().reconstruct_many([], problem(1).victim, seeds=[]) == []
