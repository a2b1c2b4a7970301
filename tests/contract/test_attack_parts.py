"""Every part of gradient matching can be put into any attack that matches gradients, from the command line alone."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from gia_bench.attacks.matching import GradientMatching
from gia_bench.conf_path import CONF
from gia_bench.signatures import check_types

README = (Path(__file__).parents[2] / "README.md").read_text()
COSINE = "{_target_: gia_bench.attacks.distances.Cosine}"
WRAPPED = {"distance": COSINE}
NOTHING: dict[str, str] = {}
ADAM = {"optimizer": "{_target_: gia_bench.attacks.optimizers.Adam}"}

ONE_OF_THEM: dict[str, dict[str, dict[str, str]]] = {
    "distance": {
        "distances": dict.fromkeys(("Euclidean", "EuclideanMean", "L1", "Cosine", "LayerCosine", "Angular"), NOTHING),
        "wrapped": {"Masked": WRAPPED, "Layers": WRAPPED, "Weighted": WRAPPED, "Scaled": {**WRAPPED, "factor": "2"}},
        "adaptive": {"Likelihood": {"otherwise": COSINE}},
    },
    "optimizer": {
        "optimizers": {"Adam": {}, "SGD": {}}, "lbfgs": {"LBFGS": {}},
        "one_at_a_time": {"OneAtATime": ADAM}, "plateau": {"Plateau": ADAM},
    },
    "schedule": {"schedules": {"Constant": {}, "StepDecay": {}, "CosineWarmup": {}}},
    "initial": {
        "initial": {
            "Randn": {}, "Uniform": {}, "Zeros": {}, "Filled": {"value": "0.5"}, "Patterned": {"width": "4"},
            "GivenImage": {"path": "guess.png"},
        }
    },
    "replay": {"replay": {"OneStep": {}, "LocalSteps": {}, "EpochAverage": {}}},
}  # fmt: skip
NO_OPTIMIZERS = ("Raw", "Sign", "SoftSign", "Evaluate", "Moment")
WEIGHT = {"weight": "0.1"}
ANY_NUMBER: dict[str, dict[str, dict[str, dict[str, str]]]] = {
    "priors": {
        "priors": dict.fromkeys(
            ("TotalVariation", "PaddedTotalVariation", "IsotropicTotalVariation", "Norm", "PixelRange"), WEIGHT
        ),
        "batch_norm": {"RunningStatistics": WEIGHT, "InferredStatistics": WEIGHT},
    },
    "forces": {"forces": {"Langevin": {"scale": "0.1"}, "GroupConsistency": WEIGHT}},
    "constraints": {"adaptive": {"Withheld": WEIGHT}},
}
CASES = [
    (part, f"gia_bench.attacks.{module}.{name}", arguments)
    for parts in (ONE_OF_THEM, ANY_NUMBER)
    for part, modules in parts.items()
    for module, names in modules.items()
    for name, arguments in names.items()
]


@pytest.mark.parametrize(
    ("part", "target", "arguments"), CASES, ids=[target.rpartition(".")[2] for _, target, _ in CASES]
)
@pytest.mark.parametrize("attack", ["dlg", "idlg", "cpl", "inverting_gradients", "sgi", "gradinversion", "dga", "gia"])
def test_a_part_stands_in_any_attack(attack: str, part: str, target: str, arguments: dict[str, str]) -> None:
    value = ", ".join([f"_target_: {target}", *(f"{k}: {v}" for k, v in arguments.items())])
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        there = part in compose("config", overrides=[f"attack=[{attack}]"]).attack[attack]
        place = f"attack.{attack}.{part}" + (".own" if part in ANY_NUMBER else "")
        out = [f"~{place}"] if there and part in ONE_OF_THEM else []
        settings = compose("config", overrides=[f"attack=[{attack}]", *out, f"+{place}={{{value}}}"]).attack[attack]
    check_types(settings, f"attack.{attack}")
    made = instantiate(settings, _convert_="all")
    assert isinstance(made, GradientMatching)
    built = getattr(made, part)["own"] if part in ANY_NUMBER else getattr(made, part)
    assert f"{type(built).__module__}.{type(built).__name__}" == target


def matching() -> list[str]:
    """Every preset that is gradient matching."""
    names = sorted(path.stem for path in (CONF / "attack").glob("*.yaml"))
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        composed = {name: compose("config", overrides=[f"attack=[{name}]"]).attack[name] for name in names}
    return [n for n, settings in composed.items() if "steps" in settings and built_by_matching(settings["_target_"])]


def built_by_matching(target: str) -> bool:
    """Whether a function or class of the attacks gives ``GradientMatching``."""
    module, _, name = target.rpartition(".")
    made = getattr(import_module(module), name)
    return not inspect.isclass(made) and inspect.signature(made).return_annotation == "GradientMatching"


@pytest.mark.parametrize("attack", matching())
def test_every_preset_takes_one_of_each_part_at_once(attack: str) -> None:
    chosen = {part: next(c for c in CASES if c[0] == part) for part in (*ONE_OF_THEM, "priors", "forces")}
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        preset = compose("config", overrides=[f"attack=[{attack}]"]).attack[attack]
        words = []
        for part, (_, target, arguments) in chosen.items():
            value = ", ".join([f"_target_: {target}", *(f"{k}: {v}" for k, v in arguments.items())])
            place = f"attack.{attack}.{part}" + (".own" if part in ANY_NUMBER else "")
            words += [f"~{place}"] if part in preset and part in ONE_OF_THEM else []
            words.append(f"+{place}={{{value}}}")
        made = instantiate(compose("config", overrides=[f"attack=[{attack}]", *words]).attack[attack], _convert_="all")
    assert isinstance(made, GradientMatching)
    for part, (_, target, _) in chosen.items():
        own = getattr(made, part)["own"] if part in ANY_NUMBER else getattr(made, part)
        assert f"{type(own).__module__}.{type(own).__name__}" == target


@pytest.mark.parametrize(
    "part", ["distance", "optimizer", "schedule", "initial", "replay", "priors", "forces", "constraints"]
)
def test_the_readme_names_everything_that_can_stand_there(part: str) -> None:
    [row] = [line for line in README.splitlines() if line.startswith(f"| `{part}`")]
    for _, target, _ in (case for case in CASES if case[0] == part):
        module, _, name = target.rpartition(".")
        assert f"{name}`" in row and f"`{module.rpartition('.')[2]}." in row, name
    # and nothing of these modules is forgotten here
    listed = {target for _, target, _ in CASES}
    for module in {target.rpartition(".")[0] for p, target, _ in CASES if p == part}:
        own = [c for _, c in inspect.getmembers(import_module(module), inspect.isclass) if c.__module__ == module]
        public = [c for c in own if (not c.__name__.startswith("_") and "__call__" in vars(c)) or "step" in vars(c)]
        parts = {f"{module}.{c.__name__}" for c in public if not inspect.isabstract(c)}
        assert parts - listed <= {f"gia_bench.attacks.optimizers.{c}" for c in NO_OPTIMIZERS}


def test_a_part_that_does_not_exist_is_refused() -> None:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        settings = compose("config", overrides=["attack=[dlg]", "+attack.dlg.prior=1"]).attack.dlg
    with pytest.raises(Exception, match="unexpected keyword argument 'prior'"):
        instantiate(settings, _convert_="all")
