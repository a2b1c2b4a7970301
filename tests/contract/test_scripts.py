"""Every run that scripts/ would start composes, so that a long list does not end at a misspelt word."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf

from gia_bench.conf_path import CONF
from gia_bench.config import identify

SCRIPTS = Path(__file__).parents[2] / "scripts"


def runs() -> Iterator[tuple[str, list[str]]]:
    """The words of every run, by script and part."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        attacks, defenses, malicious = map(import_module, ("attacks", "defenses", "malicious"))
    finally:
        sys.path.remove(str(SCRIPTS))
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


def test_the_scripts_start_runs() -> None:
    assert {name.partition(" ")[0] for name, _ in RUNS} == {"attacks", "defenses", "malicious"}


@pytest.mark.parametrize("script", sorted({name for name, _ in RUNS}))
def test_every_run_of_a_script_composes_and_no_two_are_one(script: str) -> None:
    found: dict[str, str] = {}
    for words in (words for name, words in RUNS if name == script):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=words, return_hydra_config=True)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        assert isinstance(choices, dict) and cfg.hydra.mode in (None, RunMode.RUN)
        with_none = {str(k): str(v) for k, v in choices.items()}
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        run_id = identify(cfg, with_none).origin.run_id
        assert run_id not in found, f"{' '.join(words)} is the same run as {found[run_id]}"
        found[run_id] = " ".join(words)
