"""Every defense with every threat, protocol, aggregation and family of models, composed from conf/ as a command line
composes it.

Each defense is built by ``config.build``, with either protocol and aggregation and a model of each family, on the
embedded digits. What builds is held against every threat with every attack of conf/, by the functions that ``build``
calls for them: every threat is built too, with either protocol, a model of each family and attacks in turn, and says
the same. What is refused is refused with a sentence that names a way out. Rounds are played in ``test_combinations``.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import hydra
import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gia_bench.attacks.base import Attack
from gia_bench.compatibility import check_aggregation, check_attacked, check_examples, check_rounds, check_threat
from gia_bench.conf_path import CONF
from gia_bench.config import Experiment, build, identify
from gia_bench.data import digits
from gia_bench.data.source import Dataset
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.threat import ThreatModel

PROTOCOLS = ("fedsgd", "fedavg")
FAMILIES: dict[str, tuple[str, ...]] = {
    "convolutional": ("model=lenet",),
    "normalised": ("model=resnet20",),
    "connected": ("model=mlp",),
    "attending": ("model=vit_april",),
    # it ends in a convolution, and takes images from 17 pixels
    "headless": ("model=torchvision", "model.network.name=squeezenet1_1", "dataset.size=32"),
}
AGGREGATIONS = ("plain", "secure")
COMBINATIONS = tuple(itertools.product(PROTOCOLS, FAMILIES))
SENTENCE = re.compile(r"\S+( \S+){7,}")
WAY_OUT = re.compile(r"\b(choose|take|set|give|train|leave|lower|raise) ", re.IGNORECASE)
NAMELESS = "''"

Answer = TypeVar("Answer")


def names(group: str) -> list[str]:
    found = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert found
    return found


DEFENSES, THREATS, ATTACKS = names("defense"), names("threat"), names("attack")


@functools.cache
def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=["attack=[]", "logger=none", *overrides])


@functools.cache
def chosen(group: str, name: str) -> DictConfig:
    """The program with one choice, which sets nothing outside its group's section."""
    cfg = composed(f"{group}=[{name}]" if group == "attack" else f"{group}={name}")
    with_it, without = (OmegaConf.to_container(c) for c in (cfg, composed()))
    assert isinstance(with_it, dict) and isinstance(without, dict)
    assert with_it | {group: None} == without | {group: None}, "or putting sections together would not be composing"
    return cfg


def built(protocol: str, family: str, *overrides: str, **choices: str) -> Experiment:
    """A run with these choices, as ``app`` builds it. A choice's section is put into what Hydra made of the others:
    composing each combination anew would take twice as long as building it."""
    cfg = composed(f"fl={protocol}", *FAMILIES[family], *overrides).copy()
    for group, name in choices.items():
        cfg[group] = chosen(group, name)[group]
    known = {"dataset": "digits", "model": family, "fl": protocol, "threat": "curious_server", "defense": "none"}
    return build(cfg, identify(cfg, known | choices))


@functools.cache
def undefended(protocol: str, family: str) -> Experiment:
    return built(protocol, family)


@functools.cache
def attack_of(name: str) -> Attack:
    made: Attack = instantiate(chosen("attack", name).attack[name], _convert_="all")
    return made


@functools.cache
def threat_of(name: str) -> ThreatModel:
    made: ThreatModel = instantiate(chosen("threat", name).threat, _convert_="all")
    return made


def hold(experiment: Experiment, threat: ThreatModel, name: str) -> None:
    """What ``build`` asks of a threat and an attack, for a run that was built without an attack."""
    attack = attack_of(name)
    check_threat(name, attack, threat)
    check_aggregation(name, threat, experiment.rules.aggregation)
    attack.check_victim(experiment.rules.victim)
    check_attacked(threat, experiment.data, experiment.schedule)
    check_examples(name, attack, threat, experiment.data, experiment.schedule)
    check_rounds(name, attack, threat, experiment.data, experiment.schedule)


def asked(question: Callable[[], Answer], refusal: type[ConfigError] = ConfigError) -> Answer | str:
    """The answer, or the sentence that refuses it. Any other exception goes through and fails the test."""
    try:
        return question()
    except refusal as error:
        said = str(error)
        if not SENTENCE.search(said) or not WAY_OUT.search(said) or NAMELESS in said:
            raise AssertionError(f"no sentence with a way out: {said}") from error
        return said


@pytest.fixture(autouse=True, scope="module")
def loaded_once() -> Iterator[None]:
    """The digits are read and resized once for each size, not for every run."""
    load, kept = digits.digits, dict[str, Dataset]()

    @functools.wraps(load)
    def loaded(**settings: Any) -> Dataset:
        key = str(settings)
        if key not in kept:
            kept[key] = load(**settings)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "digits", loaded)
        yield


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_defense_is_built_for_every_protocol_family_and_threat_or_is_skipped_with_a_sentence(defense: str) -> None:
    attacked: dict[str, set[str]] = {aggregation: set() for aggregation in AGGREGATIONS}
    for (protocol, family), aggregation in itertools.product(COMBINATIONS, AGGREGATIONS):
        # every setting is a default, so that what is refused is the combination, which a sweep skips
        question = partial(built, protocol, family, defense=defense, aggregation=aggregation)
        experiment = asked(question, IncompatibleError)
        if isinstance(experiment, str):
            continue
        for threat, attack in itertools.product(THREATS, ATTACKS):
            if asked(partial(hold, experiment, threat_of(threat), attack)) is None:
                attacked[aggregation].add(threat)
    assert attacked["plain"] == set(THREATS), "never built, or a threat under which nothing attacks it"
    hidden = {t for t in THREATS if not threat_of(t).sees_clients}
    assert attacked["secure"] == hidden, "behind masks no client's update is seen"


@pytest.mark.parametrize("threat", THREATS)
def test_a_threat_is_built_for_every_protocol_and_family_with_the_attacks_it_allows_in_turn(threat: str) -> None:
    allows = {a: asked(partial(check_threat, a, attack_of(a), threat_of(threat))) is None for a in ATTACKS}
    allowed = [attack for attack, may in allows.items() if may]
    # every threat begins elsewhere, so that most attacks have their turn
    turns = itertools.islice(itertools.cycle(allowed), THREATS.index(threat), None)
    num_built = 0
    for (protocol, family), attack in zip(COMBINATIONS, turns, strict=False):
        run = asked(partial(built, protocol, family, threat=threat, attack=attack))
        said = asked(partial(hold, undefended(protocol, family), threat_of(threat), attack))
        assert said == (run if isinstance(run, str) else None), "what is built is not what was asked"
        num_built += isinstance(run, Experiment)
    assert num_built
    for attack in [a for a, may in allows.items() if not may][:1]:
        with pytest.raises(IncompatibleError, match=f"attack {attack} needs .* threat={threat} "):
            built(*COMBINATIONS[0], threat=threat, attack=attack)


@pytest.mark.parametrize("pruning", ["none", "random"])
@pytest.mark.parametrize("defense", ["mixup", "instahide"])
def test_mixing_in_steps_of_one_example_is_refused_before_anything_is_trained(defense: str, pruning: str) -> None:
    one, rest_of_one = ("fedsgd", "fl.local.batch_size=1"), ("fedavg", "fl.local.batch_size=13")  # 144 = 11 * 13 + 1
    for protocol, size in (one, rest_of_one):
        with pytest.raises(IncompatibleError, match=r"1 example.*fl\.local\.batch_size"):
            built(protocol, "convolutional", size, defense=defense, pruning=pruning)
    assert built("fedavg", "convolutional", defense=defense, pruning=pruning).data.step_sizes == {7, 8}
