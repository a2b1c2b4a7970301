"""What every attack in conf/attack keeps, whatever it is."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attack_problems import Problem, problem
from hydra.utils import instantiate
from omegaconf import OmegaConf

from gia_bench.attacks.analytic import Analytic
from gia_bench.attacks.base import Attack
from gia_bench.attacks.batch_norm import RunningStatistics
from gia_bench.attacks.cpl import cpl
from gia_bench.attacks.distances import Cosine, Euclidean
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.forces import Langevin
from gia_bench.attacks.graddefense import dga, gia
from gia_bench.attacks.gradinversion import PRIORS, gradinversion
from gia_bench.attacks.idlg import idlg
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam, Sign
from gia_bench.attacks.priors import PaddedTotalVariation
from gia_bench.attacks.sgi import sgi
from gia_bench.attacks.wrapped import Layers
from gia_bench.conf_path import CONF
from gia_bench.models.mlp import mlp
from gia_bench.threat import Knowledge, Power

PRESETS: dict[str, Callable[[], Attack]] = {
    "analytic": Analytic,
    "cpl": cpl,
    "dga": dga,
    "dga_muted": lambda: dga(distance=Layers(distance=Euclidean())),
    "dlg": dlg,
    "gia": gia,
    "gia_muted": lambda: gia(distance=Layers(distance=Cosine())),
    "gradinversion": gradinversion,
    "gradinversion_dgp_paper": lambda: gradinversion(
        restarts=1,
        optimizer=Adam(lr=0.1, transform=Sign()),
        priors={**PRIORS, "batch_norm": RunningStatistics(weight=0.01)},
        forces={"langevin": Langevin(scale=0.02)},
    ),
    "idlg": idlg,
    "inverting_gradients": inverting_gradients,
    "inverting_gradients_dgp_paper": lambda: inverting_gradients(
        steps=12_000, priors={"total_variation": PaddedTotalVariation(weight=0.2)}
    ),
    "inverting_gradients_fast": lambda: inverting_gradients(steps=1_000, snapshot_every=250),
    "sgi": sgi,
}
FILES = sorted((CONF / "attack").glob("*.yaml"))


def built(file: Path) -> Attack:
    attack = instantiate(OmegaConf.load(file), _convert_="all")
    assert isinstance(attack, Attack)
    return attack


def short(file: Path) -> Attack:
    attack = built(file)
    return dataclasses.replace(attack, steps=2) if isinstance(attack, GradientMatching) else attack


def observed(attack: Attack) -> Problem:
    """Two victims that fit the attack, and everything it may ask to see."""
    # tanh: of six ReLU units all may be dead
    net = mlp((1, 8, 8), 4, hidden=(6,), activation="tanh") if isinstance(attack, Analytic) else None
    p = problem(2, module=net, dtype=torch.float64)
    if Knowledge.LABELS not in attack.requires:
        return p
    shown = [dataclasses.replace(o, labels=y) for o, y in zip(p.observations, p.labels, strict=True)]
    return dataclasses.replace(p, observations=shown)


def test_every_attack_has_its_settings_written_twice() -> None:
    assert {f.stem for f in FILES} == set(PRESETS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_file_is_packaged_under_its_own_name_so_that_several_can_be_chosen(file: Path) -> None:
    assert file.read_text().startswith(f"# @package attack.{file.stem}\n")


@pytest.mark.parametrize("name", PRESETS)
def test_the_file_of_a_paper_and_its_function_have_the_same_defaults(name: str) -> None:
    assert built(CONF / "attack" / f"{name}.yaml") == PRESETS[name]()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_attack_returns_one_finite_reconstruction_per_observation_in_order(file: Path) -> None:
    attack = short(file)
    p = observed(attack)
    assert not attack.requires & ~(Knowledge.NUM_EXAMPLES | Knowledge.LABELS | Knowledge.BUFFERS)
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
