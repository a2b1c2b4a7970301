"""attack=standard is a ruler: whoever changes a member or one of its settings gives it a new version."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch
from attack_problems import problem
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gia_bench.attacks.evidence import improbability
from gia_bench.conf_path import CONF
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.defenses.quantize import QSGD
from gia_bench.values import Reconstruction

PINNED = {1: "1dea2c24c060e6f2", 2: "4e595ed83cdeb2c9", 3: "11310f583a8f7fa0"}
"""version -> a hash of all settings, from 3 on of what the choice depends on too. A version that was published stays
here."""


def choice() -> list[str]:
    """What four observations say of a guess, to three digits: numbers, noise, rounding and signs."""
    p = problem(2)
    o, draw = p.observations[0], torch.Generator().manual_seed(0)
    noisy = {k: u + 0.1 * torch.randn(u.shape, generator=draw) for k, u in o.update.items()}
    steps = {k: 0.1 * (u / 0.1).round() for k, u in o.update.items()}
    seen = (
        o,
        dataclasses.replace(o, update=noisy, defense=GaussianNoise(scale=0.1)),
        dataclasses.replace(o, update=steps, defense=QSGD(levels=7)),
        dataclasses.replace(o, update={k: u.sign() for k, u in o.update.items()}),
    )
    guess = Reconstruction(inputs=0.8 * p.images[0] + 0.2 * p.images[1], labels=p.labels[0], score=0.0)
    return [f"{improbability(guess, one, p.victim):.3g}" for one in seen]


def test_a_changed_standard_has_a_new_version() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["attack=[standard]"])
    settings = OmegaConf.to_container(cfg.attack.standard, resolve=True)
    assert isinstance(settings, dict)
    version = settings.pop("version")
    settings["choice"] = choice()
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    assert PINNED.get(version) == found, (
        "the members of attack=standard, or presets that they inherit, have changed: raise conf/attack/standard.yaml's "
        f"version and pin {found} for it here, so that numbers of two versions are not compared"
    )
