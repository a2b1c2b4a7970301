"""What is refused is refused when a run is composed, through ``config.build`` as the command line calls it."""

from __future__ import annotations

import hydra
import pytest

from gia_bench.conf_path import CONF
from gia_bench.config import Experiment, build, identify
from gia_bench.errors import IncompatibleError


def built(*overrides: str) -> Experiment:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", overrides=["attack=[]", "logger=none", *overrides])
    return build(cfg, identify(cfg, dict.fromkeys(("dataset", "model", "fl", "threat", "defense"), "")))


@pytest.mark.parametrize("defense", [["defense=mixup"], ["defense=instahide"], ["defense=mixup", "pruning=random"]])
def test_mixing_in_steps_of_one_example_is_refused_before_anything_is_trained(defense: list[str]) -> None:
    for local in (["fl.local.batch_size=1"], ["fl=fedavg", "fl.local.batch_size=13"]):  # 143 = 11 * 13, 144: 1 is left
        with pytest.raises(IncompatibleError, match=r"1 example.*fl\.local\.batch_size"):
            built(*defense, *local)
    built(*defense, "fl=fedavg")
