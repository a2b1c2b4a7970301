"""attack=standard is a ruler: whoever changes a member or one of its settings gives it a new version."""

from __future__ import annotations

import hashlib
import json

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gia_bench.attacks.evidence import EXACT, ROUGHNESS
from gia_bench.conf_path import CONF

PINNED = {1: "1dea2c24c060e6f2", 2: "4e595ed83cdeb2c9", 3: "aceb37759b096332"}
"""version -> a hash of all settings, from 3 on of what the choice depends on too. A version that was published stays
here."""


def test_a_changed_standard_has_a_new_version() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["attack=[standard]"])
    settings = OmegaConf.to_container(cfg.attack.standard, resolve=True)
    assert isinstance(settings, dict)
    version = settings.pop("version")
    settings["choice"] = [EXACT, ROUGHNESS]
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    assert PINNED.get(version) == found, (
        "the members of attack=standard, or presets that they inherit, have changed: raise conf/attack/standard.yaml's "
        f"version and pin {found} for it here, so that numbers of two versions are not compared"
    )
