"""From composed YAML to checked parts: the only reader of ``DictConfig``."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gia_bench.attacks.base import Attack
from gia_bench.compatibility import (
    check_aggregation,
    check_attacked,
    check_examples,
    check_rounds,
    check_sampling,
    check_threat,
)
from gia_bench.data.datamodule import FederatedDataModule
from gia_bench.data.partition import Partition, Scheme
from gia_bench.data.public import public_examples
from gia_bench.data.source import Dataset
from gia_bench.defenses.base import Defense
from gia_bench.errors import ConfigError, GiaBenchError
from gia_bench.errors import choices as choices_of
from gia_bench.federated.aggregation import Aggregation
from gia_bench.federated.rules import Rules
from gia_bench.federated.schedule import Schedule
from gia_bench.metrics import Metrics
from gia_bench.models.build import build_victim
from gia_bench.probes.recorder import Origin
from gia_bench.pruning.base import Pruning
from gia_bench.pruning.pruned import with_pruning
from gia_bench.records.mirror import MirrorFactory
from gia_bench.signatures import check_call, check_types, check_value
from gia_bench.threat import ThreatModel
from gia_bench.values import Examples

log = logging.getLogger(__name__)

PRECISIONS = ("32-true",)
# what may differ between two runs that are the same run
_NOT_IDENTITY = ("paths", "trainer", "logger", "force", "images")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A run before its parts are built: who it is and where it lives."""

    origin: Origin
    folder: Path
    force: bool
    config: Mapping[str, Any]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class TrainerSettings:
    """What Lightning's Trainer gets (accelerator, devices, strategy, precision), and snapshot_every_seconds: how
    often a running attack saves its state. The training's state is saved at every evaluation."""

    accelerator: str
    devices: int
    strategy: str
    precision: str
    progress_bar: bool
    snapshot_every_seconds: float

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            # mixed precision would compute clients under autocast and attacks outside it
            raise ConfigError(choices_of("trainer.precision", self.precision, PRECISIONS))


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Experiment:
    """Every part of a run, bound and checked against the others."""

    run: Run
    data: FederatedDataModule
    public: Examples
    rules: Rules
    schedule: Schedule
    threat: ThreatModel
    attacks: Mapping[str, Attack]
    metrics: Metrics
    trainer: TrainerSettings
    mirror: MirrorFactory
    images: bool


def identify(cfg: DictConfig, choices: Mapping[str, str]) -> Run:
    """The run's identity: a hash of everything that its numbers depend on. ``choices``: group -> chosen name."""
    config = _plain(cfg)
    run_id = "r" + hashlib.sha256(json.dumps(_identity(cfg), sort_keys=True, default=str).encode()).hexdigest()[:11]
    named = {g: choices[g] for g in ("dataset", "model", "fl", "threat", "defense")}
    for key, declared in (("seed", "int"), ("force", "bool"), ("images", "bool")):
        check_value(cfg[key], declared, key)
    origin = Origin(run_id=run_id, experiment=str(cfg.name), seed=cfg.seed, **named)
    return Run(origin=origin, folder=Path(cfg.paths.outputs) / cfg.name / run_id, force=cfg.force, config=config)


def build(cfg: DictConfig, run: Run) -> Experiment:
    """Loads the data, makes every part, and checks that they go together.

    Raises ``ConfigError`` for a setting out of range, ``IncompatibleError`` for parts that do not go together, and
    ``DataError`` for absent or corrupt files.
    """
    inner: Defense = _make(cfg, "defense")
    pruning: Pruning = _make(cfg, "pruning")
    attacks: dict[str, Attack] = {name: _attack(cfg, name) for name in cfg.attack}
    threat: ThreatModel = _make(cfg, "threat")
    schedule: Schedule = _make(cfg, "fl")
    aggregation: Aggregation = _make(cfg, "aggregation")
    pruning.check_local(schedule.local)
    for remark in filter(None, (leaf.remark(schedule.local) for leaf in inner.leaves())):
        log.warning(remark)
    pruning.check_public(cfg.public.split)
    defense = with_pruning(inner, pruning)
    metrics: Metrics = _make(cfg, "metrics")
    trainer: TrainerSettings = _make(cfg, "trainer")
    mirror: MirrorFactory = _make(cfg, "logger")
    for name, attack in attacks.items():
        check_threat(name, attack, threat)
        check_aggregation(name, threat, aggregation)
    dataset: Dataset = _make(cfg, "dataset")
    victim = _bound(
        "model", build_victim, **_make(cfg, "model"), input_shape=dataset.shape, num_classes=dataset.num_classes,
        mean=dataset.mean, std=dataset.std, seed=cfg.seed, prepare=defense.prepare_model,
    )  # fmt: skip
    check_sampling(schedule.local, victim)
    for attack in attacks.values():
        attack.check_victim(victim)
    _bound("fl.server.optimizer", schedule.server.configure, parameters=victim.module.parameters())
    partition = _partition(_make(cfg, "partition"), dataset, cfg.seed)
    public: Examples = _bound("public", public_examples, dataset=dataset, partition=partition, **_make(cfg, "public"))
    data = FederatedDataModule(
        dataset=dataset, partition=partition, local=schedule.local, clients_per_round=schedule.clients_per_round,
        seed=cfg.seed,
    )  # fmt: skip
    defense.check_victim(victim)
    defense.check_steps(data.step_sizes)
    defense = defense.calibrate(victim, public)
    rules = Rules(
        victim=victim, defense=defense, local=schedule.local, executor=schedule.executor, seed=cfg.seed,
        weighting=schedule.weighting, on_nonfinite=schedule.on_nonfinite, aggregation=aggregation,
    )  # fmt: skip
    check_attacked(threat, data, schedule)
    for name, attack in attacks.items():
        check_examples(name, attack, threat, data, schedule)
        check_rounds(name, attack, threat, data, schedule)
    return Experiment(
        run=run, data=data, public=public, rules=rules, schedule=schedule, threat=threat, attacks=attacks,
        metrics=metrics, trainer=trainer, mirror=mirror, images=cfg.images,
    )  # fmt: skip


def public_data(cfg: DictConfig) -> tuple[Dataset, Examples]:
    """The dataset, and its examples that no client holds: what ``build`` gives an attacker with public data."""
    dataset: Dataset = _make(cfg, "dataset")
    partition = _partition(_make(cfg, "partition"), dataset, cfg.seed)
    return dataset, _bound("public", public_examples, dataset=dataset, partition=partition, **_make(cfg, "public"))


def _attack(cfg: DictConfig, name: str) -> Attack:
    if "_target_" not in cfg.attack[name]:
        raise ConfigError(
            f"attack.{name} has settings ({', '.join(cfg.attack[name])}), but no attack of that name was chosen: add "
            f"it to attack=[...], or leave its settings out with ~attack.{name}"
        )
    attack: Attack = _make(cfg, f"attack.{name}")
    return attack


def _partition(scheme: Scheme, dataset: Dataset, seed: int) -> Partition:
    """The clients' data: training examples but for those that must not be attacked."""
    unfit = torch.tensor(sorted(dataset.unfit_targets), dtype=torch.int64)
    fit = torch.arange(len(dataset.train))
    fit = fit[~torch.isin(fit, unfit)]
    groups = dataset.train.groups
    return scheme.split(dataset.train.labels[fit], None if groups is None else groups[fit], seed).within(fit)


def _plain(node: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def _identity(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration with everything that leaves the numbers alone taken out."""
    blank = cfg.copy()
    OmegaConf.set_readonly(blank, False)
    OmegaConf.set_struct(blank, False)
    for key in blank.paths:
        blank.paths[key] = ""  # so that values interpolated from paths vanish too
    blank.dataset.pop("download", None)
    config = _plain(blank)
    precision = config["trainer"]["precision"]
    return {k: v for k, v in config.items() if k not in _NOT_IDENTITY} | {"precision": precision}


def _make(cfg: DictConfig, section: str) -> Any:
    """The object that a section describes; nested lists and dicts become plain Python."""
    node = OmegaConf.select(cfg, section)
    check_types(OmegaConf.to_container(node, resolve=True), section)
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, GiaBenchError):
                raise cause from error
            cause = cause.__cause__
        raise ConfigError(f"{section} cannot be built: {' '.join(str(error).split())}") from error


def _bound(section: str, target: Any, **arguments: Any) -> Any:
    """Call with a sentence for a key that the target does not take, or a value of another type."""
    check_call(target, arguments, section)
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{section} cannot be built: {error}") from error
