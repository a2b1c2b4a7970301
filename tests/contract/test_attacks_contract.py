"""What every attack in conf/attack keeps, whatever it is."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attack_problems import Problem, problem
from generator_problems import Held, dcgan
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gia_bench.attacks.adaptive import Likelihood, Withheld
from gia_bench.attacks.analytic import Analytic
from gia_bench.attacks.april import April
from gia_bench.attacks.april_optimized import WithPositions, april_optimized
from gia_bench.attacks.auxiliary_mean import AuxiliaryMean
from gia_bench.attacks.base import Attack, Broadcast
from gia_bench.attacks.batch_norm import RunningStatistics
from gia_bench.attacks.compensating import Compensating
from gia_bench.attacks.cpl import cpl
from gia_bench.attacks.curious_abandon_honesty import CuriousAbandonHonesty
from gia_bench.attacks.distances import Cosine, Euclidean
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.feature_fishing import FeatureFishing
from gia_bench.attacks.fishing import ClassFishing
from gia_bench.attacks.forces import Langevin
from gia_bench.attacks.generative import Generative
from gia_bench.attacks.ggl import GGL
from gia_bench.attacks.gias import GIAS
from gia_bench.attacks.gifd import GIFD
from gia_bench.attacks.graddefense import dga, gia
from gia_bench.attacks.gradinversion import gradinversion
from gia_bench.attacks.idlg import idlg
from gia_bench.attacks.imprint import Normal
from gia_bench.attacks.initial import Patterned
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.learned_inverter import LearnedInverter
from gia_bench.attacks.loki import Loki
from gia_bench.attacks.matching import GradientMatching, Parts
from gia_bench.attacks.oblivious import Oblivious
from gia_bench.attacks.one_at_a_time import OneAtATime
from gia_bench.attacks.optimizers import Adam, Sign, SoftSign
from gia_bench.attacks.priors import PaddedTotalVariation, TotalVariation
from gia_bench.attacks.replay import EpochAverage
from gia_bench.attacks.rgap import RGAP
from gia_bench.attacks.robbing import RobbingTheFed
from gia_bench.attacks.schedules import CosineWarmup
from gia_bench.attacks.sgi import sgi
from gia_bench.attacks.standard import Standard
from gia_bench.attacks.wrapped import Layers
from gia_bench.conf_path import CONF
from gia_bench.data.source import InMemory
from gia_bench.defenses.none import NoDefense
from gia_bench.generators.load import Saved
from gia_bench.models.mlp import mlp
from gia_bench.models.vit import vit_april
from gia_bench.seeding import derive
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Batch, Observation

CLSATTACK: Parts = {
    "optimizer": Adam(lr=0.1, transform=SoftSign()),
    "schedule": CosineWarmup(),
    "initial": Patterned(width=4),
    "priors": {"total_variation": PaddedTotalVariation(weight=0.2, inner=2.0, outer=0.5, double_opponents=True)},
}
PRESETS: dict[str, Callable[[], Attack]] = {
    "analytic": Analytic,
    "april": April,
    "april_optimized": april_optimized,
    "auxiliary_mean": AuxiliaryMean,
    "class_fishing": lambda: ClassFishing(attack=inverting_gradients(**CLSATTACK)),
    "cpl": cpl,
    "curious_abandon_honesty": CuriousAbandonHonesty,
    "dga": dga,
    "dga_muted": lambda: dga(distance=Layers(distance=Euclidean())),
    "dlg": dlg,
    "dlg_paper": lambda: dlg(steps=1_200),
    "feature_fishing": lambda: FeatureFishing(attack=inverting_gradients(**CLSATTACK)),
    "gia": gia,
    "gia_paper": lambda: gia(optimizer=Adam(lr=0.1, transform=Sign())),
    "gia_compensating": lambda: Compensating(attack=gia()),
    "gia_muted": lambda: gia(distance=Layers(distance=Cosine())),
    "ggl": lambda: GGL(generator=Saved(path=None)),
    "gias": lambda: GIAS(generator=Saved(path=None)),
    "gifd": lambda: GIFD(generator=Saved(path=None)),
    "gradinversion": gradinversion,
    "gradinversion_paper": lambda: gradinversion(forces={**gradinversion().forces, "langevin": Langevin(scale=0.2)}),
    "gradinversion_dgp_paper": lambda: gradinversion(
        restarts=1,
        optimizer=Adam(lr=0.1, transform=Sign()),
        priors={
            **gradinversion().priors,
            "total_variation": PaddedTotalVariation(weight=1e-4, double_opponents=True),
            "batch_norm": RunningStatistics(weight=0.01),
        },
        forces={"langevin": Langevin(scale=0.02)},
    ),
    "dlg_one_at_a_time": lambda: dlg(steps=1_200, optimizer=OneAtATime(optimizer=LBFGS())),
    "idlg": idlg,
    "inverting_gradients": inverting_gradients,
    "inverting_gradients_adaptive": lambda: inverting_gradients(
        distance=Likelihood(otherwise=Cosine()), constraints={"withheld": Withheld(weight=0.1, relative=True)}
    ),
    "inverting_gradients_fedavg": lambda: inverting_gradients(
        steps=8_000, priors={"total_variation": TotalVariation(weight=1e-6)}
    ),
    "inverting_gradients_fedavg_epochs": lambda: inverting_gradients(
        steps=8_000,
        priors={"total_variation": TotalVariation(weight=1e-6)},
        replay=EpochAverage(weight=0.1),
    ),
    "inverting_gradients_dgp_paper": lambda: inverting_gradients(
        steps=12_000, priors={"total_variation": PaddedTotalVariation(weight=0.2, double_opponents=True)}
    ),
    "inverting_gradients_joint": lambda: inverting_gradients(steps=4_800, rounds="joint"),
    "inverting_gradients_fast": lambda: inverting_gradients(steps=1_000, snapshot_every=250),
    "learned_inverter": LearnedInverter,
    "loki": Loki,
    "rgap": RGAP,
    "robbing_the_fed": RobbingTheFed,
    "robbing_the_fed_dgp_paper": lambda: RobbingTheFed(bins=Normal(), keep="smallest", tolerance=0.0),
    "sgi": sgi,
    "standard": lambda: Standard(
        members={
            "dlg": dlg(restarts=2),
            "inverting_gradients": inverting_gradients(steps=4_800, restarts=2),
            "inverting_gradients_adaptive": inverting_gradients(
                steps=4_800,
                restarts=2,
                distance=Likelihood(otherwise=Cosine()),
                constraints={"withheld": Withheld(weight=0.1, relative=True)},
            ),
            "inverting_gradients_oblivious": Oblivious(attack=inverting_gradients(steps=4_800, restarts=2)),
            "inverting_gradients_smooth": inverting_gradients(
                steps=4_800,
                restarts=2,
                priors={"total_variation": PaddedTotalVariation(weight=0.2, double_opponents=True)},
            ),
            "inverting_gradients_muted": gia(steps=4_800, labels="auto", distance=Layers(distance=Cosine())),
            "analytic": Analytic(),
        },
        version=3,
    ),
}
FILES = sorted((CONF / "attack").glob("*.yaml"))


@functools.cache
def composed(name: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = compose("config", overrides=[f"attack=[{name}]"]).attack[name]
    assert isinstance(found, DictConfig)
    return found


def built(file: Path) -> Attack:
    node = OmegaConf.load(file)
    attack = instantiate(composed(file.stem) if "defaults" in node else node, _convert_="all")
    assert isinstance(attack, Attack)
    return attack


def short(file: Path) -> Attack:
    attack = built(file)
    if isinstance(attack, Compensating) and isinstance(attack.attack, GradientMatching):
        return dataclasses.replace(attack, attack=dataclasses.replace(attack.attack, steps=2))
    if isinstance(attack, Generative):
        return shorter(attack)
    if isinstance(attack, LearnedInverter):
        return dataclasses.replace(attack, epochs=2, hidden=8)
    if isinstance(attack, FeatureFishing):  # of one example, all are to be fished
        return dataclasses.replace(attack, share=1.0, attack=dataclasses.replace(attack.attack, steps=2))
    if isinstance(attack, ClassFishing):
        return dataclasses.replace(attack, attack=dataclasses.replace(attack.attack, steps=2))
    if isinstance(attack, Standard):
        members = {n: m for n, m in attack.members.items() if isinstance(m, GradientMatching)}
        return Standard(members={n: dataclasses.replace(m, steps=2) for n, m in members.items()})
    return dataclasses.replace(attack, steps=2) if isinstance(attack, GradientMatching) else attack


def shorter(attack: Generative) -> Generative:
    """With a generator, which no preset has, and few steps."""
    attack = dataclasses.replace(attack, generator=Held(dcgan()))
    if isinstance(attack, GGL):
        return dataclasses.replace(attack, evolution=dataclasses.replace(attack.evolution, generations=2))
    if isinstance(attack, GIAS):
        return dataclasses.replace(attack, steps=2, tuning_steps=2)
    assert isinstance(attack, GIFD)
    return dataclasses.replace(attack, steps=2)


def observed(attack: Attack) -> Problem:
    """Two victims that fit the attack, and everything it may ask to see."""
    # tanh: of six ReLU units all may be dead
    net = mlp((1, 8, 8), 4, hidden=(6,), activation="tanh") if isinstance(attack, Analytic) else None
    looks_at_positions = isinstance(attack, GradientMatching) and isinstance(attack.distance, WithPositions)
    if isinstance(attack, April) or looks_at_positions:
        net = vit_april((1, 8, 8), 4, dim=16)
    p = problem(2, module=net, dtype=torch.float64)
    if attack.needs:
        return tampered(attack, p)
    if Knowledge.PUBLIC in attack.requires:
        public = InMemory(*_pictures(problem(16)))
        p = dataclasses.replace(p, observations=[dataclasses.replace(o, public=public) for o in p.observations])
    if Knowledge.DEFENSE in attack.requires:
        p = dataclasses.replace(p, observations=[dataclasses.replace(o, defense=NoDefense()) for o in p.observations])
    if Knowledge.LABELS not in attack.requires:
        return p
    shown = [dataclasses.replace(o, labels=y) for o, y in zip(p.observations, p.labels, strict=True)]
    return dataclasses.replace(p, observations=shown)


def tampered(attack: Attack, honest: Problem) -> Problem:
    """The same images with the label 0, sent for what a malicious server broadcasts."""
    seed = next(s for s in range(99) if derive(s, "target_class") % honest.victim.num_classes == 0)
    sent = attack.tamper(
        Broadcast(honest.victim, *honest.victim.initial()), seed=seed, public=InMemory(*_pictures(honest))
    )
    assert (sent.victim is honest.victim) == (Power.CHANGE_MODEL not in attack.needs)
    labels = torch.zeros_like(honest.labels)

    def send(x: torch.Tensor, y: torch.Tensor) -> Observation:
        own = Batch(x, y, torch.ones(len(y), dtype=x.dtype))
        update = torch.func.grad(lambda p: sent.victim.objective(p, sent.buffers, own)[0])(sent.params)
        return Observation(params=sent.params, buffers=sent.buffers, update=update, num_examples=len(y))

    observations = [send(x, y) for x, y in zip(honest.images, labels, strict=True)]
    return Problem(sent.victim, observations, honest.images, labels)


def _pictures(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return p.images.flatten(0, 1), p.labels.flatten()


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
    shown = Knowledge.NUM_EXAMPLES | Knowledge.LABELS | Knowledge.BUFFERS | Knowledge.SHARED | Knowledge.DEFENSE
    assert not attack.requires & ~(shown | Knowledge.PUBLIC)
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
