"""Every run that scripts/ would start, and every experiment of conf/, can be built: a long list does not end at a
misspelt word, or at settings that do not go together, nor at a table that refuses its runs."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from hydra.utils import instantiate
from made_runs import make_run
from omegaconf import DictConfig, OmegaConf

from gia_bench import config
from gia_bench.conf_path import CONF
from gia_bench.errors import IncompatibleError
from gia_bench.report.results import Results
from gia_bench.report.tables import TableSpec, build

SCRIPTS = Path(__file__).parents[2] / "scripts"
UNFIT = ("defense=mixup", "defense=instahide")
"""Listed for batches of several images; skipped with a sentence where a client takes one."""


def script(name: str) -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


def runs() -> Iterator[tuple[str, list[str]]]:
    """The words of every run, by script and part."""
    attacks, defenses, malicious = map(script, ("attacks", "defenses", "malicious"))
    for name, part in attacks.PARTS.items():
        for words in part.settings():
            yield f"attacks {name}", ["experiment=attacks", f"name=attacks_{name}", *words]
    listed: list[object] = []
    for name, experiment in defenses.EXPERIMENTS.items():
        # a list of defenses that another experiment has too is composed once, and then its first run alone
        some = experiment.settings[:1] if experiment.settings in listed else experiment.settings
        listed.append(experiment.settings)
        for settings in some:
            yield f"defenses {name}", [f"experiment={experiment.choice}", f"name={name}", *settings]
    for name, settings in malicious.PARTS.items():
        for defense in malicious.DEFENSES.split(","):
            yield f"malicious {name}", [*malicious.COMMON, *settings, f"defense={defense}"]


RUNS = list(runs())
RUNS += [("conf/experiment", [f"experiment={path.stem}"]) for path in sorted((CONF / "experiment").glob("*.yaml"))]


@functools.cache
def dataset_of(section: str) -> Any:
    """Reading the images takes longer than everything else, and they stay the same."""
    return instantiate(OmegaConf.create(section), _convert_="all")


@pytest.fixture(autouse=True)
def real_images_read_once(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = config._make

    def read_once(cfg: DictConfig, key: str) -> Any:
        return dataset_of(OmegaConf.to_yaml(cfg.dataset, resolve=True)) if key == "dataset" else make(cfg, key)

    monkeypatch.setattr(config, "_make", read_once)


def test_the_scripts_start_runs() -> None:
    assert {name.partition(" ")[0] for name, _ in RUNS} == {"attacks", "defenses", "malicious", "conf/experiment"}


@pytest.mark.parametrize("script", sorted({name for name, _ in RUNS}))
def test_every_run_of_a_script_is_built_and_no_two_are_one(script: str, data_root: Path) -> None:
    found: dict[str, str] = {}
    for words in (words for name, words in RUNS if name == script):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=[*words, f"paths.data={data_root}"], return_hydra_config=True)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        assert isinstance(choices, dict) and cfg.hydra.mode in (None, RunMode.RUN)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        if "verify" in cfg.dataset:
            cfg.dataset.verify = False
        run = config.identify(cfg, {str(k): str(v) for k, v in choices.items()})
        assert run.origin.run_id not in found, f"{' '.join(words)} is the same run as {found[run.origin.run_id]}"
        found[run.origin.run_id] = " ".join(words)
        if set(words) & set(UNFIT):
            with pytest.raises(IncompatibleError, match="too few to mix"):
                config.build(cfg, run)
        else:
            config.build(cfg, run)


def spec_of(table: str, rows: str | None) -> TableSpec:
    """As ``gia-bench-report`` reads it, with the columns that made runs have."""
    words = [f"table={table}", *([f"table.rows=[{rows}]"] if rows else [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        spec = instantiate(compose("report", overrides=words).table, _convert_="all")
    assert isinstance(spec, TableSpec)
    made = ("psnr_db", "ssim", "test_accuracy")
    return dataclasses.replace(spec, columns={k: c for k, c in spec.columns.items() if c.metric in made})


# that of CIFAR-10 has the list and the table of the first
@pytest.mark.parametrize("name", ["defenses", "defenses_standard", "defenses_pruned", "defenses_sum"])
def test_the_table_of_a_script_takes_all_its_runs_of_two_seeds(name: str, tmp_path: Path) -> None:
    """Nothing is pooled that differs in more than the seed, and the seeds of one setting are one row."""
    experiment = script("defenses").EXPERIMENTS[name]
    fit = [words for words in experiment.settings if not set(words) & set(UNFIT)]
    attacks: set[str] = set()
    for number, words in enumerate(fit):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            overrides = [f"experiment={experiment.choice}", *words, f"paths.data={tmp_path}"]
            cfg = compose("config", overrides=overrides, return_hydra_config=True)
        defense = str(cfg.hydra.runtime.choices.defense)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        for seed in (0, 1):
            cfg.seed = seed
            config: Any = OmegaConf.to_container(cfg, resolve=True)
            attacks |= set(config["attack"])
            run_id = f"r{number}s{seed}"
            make_run(tmp_path, run_id, defense=defense, attacks=tuple(config["attack"]), seed=seed, config=config)
    table = build(spec_of(experiment.table, experiment.rows), Results.load(tmp_path))
    assert len(table.rows) == len(fit) * len(attacks)
    counts = [cells["psnr"].summary.num_victims for _, cells in table.rows if cells["psnr"].summary]
    assert counts == [6] * len(table.rows)
