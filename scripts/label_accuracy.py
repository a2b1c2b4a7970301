"""Label accuracy against the batch size, as Markdown tables:  python scripts/label_accuracy.py [options] [setting ...]

A setting is a string of overrides of conf/config.yaml, and gets a table of its own (model=lenet):

  python scripts/label_accuracy.py --all 'dataset=cifar10' model=lenet 'model=lenet model.init=uniform_half defense=dgp'

  --all OVERRIDES   for all settings (dataset=cifar10)              --updates N    per cell (20)
  --sizes N ...     of the batches (1 2 4 8 16 32 64)               --seed N       of models, batches and defenses (0)
  --classes N ...   from which one batch is drawn; one table each (10)

Every update is one client's in a FedSGD round, protected, packed and unpacked, of training images drawn without
replacement, so that labels repeat as they happen to. The attacker sees what threat=curious_server shows. A cell is the
mean over the updates of the share of labels found, in any order, with its 95 % bootstrap interval. ``chance`` guesses
every label at random; labels=auto is not listed, since it takes one of the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.markdown import Markdown

from gia_bench.attacks.labels import METHODS, accuracy
from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import Dataset
from gia_bench.defenses.base import Defense
from gia_bench.errors import IncompatibleError
from gia_bench.federated.execution import Loop
from gia_bench.federated.local import FedSGD
from gia_bench.federated.round import play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.metrics.statistics import summarize
from gia_bench.models.build import build_victim
from gia_bench.models.functional import Victim
from gia_bench.seeding import derive, stream
from gia_bench.threat import ThreatModel

INFERRED = [name for name in METHODS if name not in ("auto", "known", "joint")]
CHANCE = "chance"
Accuracies: TypeAlias = dict[str, list[float]]
"""By method, one per update."""


def batch(dataset: Dataset, size: int, classes: int, *name: int) -> torch.Tensor:
    """Indices of ``size`` training images of ``classes`` classes, both drawn from the stream with this name."""
    draw = stream(name[0], "labels", *name[1:])
    own = torch.randperm(dataset.num_classes, generator=draw)[:classes]
    fits = torch.isin(dataset.train.labels, own)
    fits[list(dataset.unfit_targets)] = False
    fitting = fits.nonzero().flatten()
    return fitting[torch.randperm(len(fitting), generator=draw)[:size]]


def parts(cfg: DictConfig, dataset: Dataset, seed: int) -> tuple[Victim, Defense, ThreatModel]:
    inner: Defense = instantiate(cfg.defense, _convert_="all")
    victim = build_victim(
        **instantiate(cfg.model, _convert_="all"), input_shape=dataset.shape, num_classes=dataset.num_classes,
        mean=dataset.mean, std=dataset.std, seed=seed, prepare=inner.prepare_model,
    )  # fmt: skip
    inner.check_victim(victim)
    return victim, inner, instantiate(cfg.threat, _convert_="all")


def measure(
    cfg: DictConfig, dataset: Dataset, size: int, classes: int, updates: int, seed: int
) -> dict[str, list[float]]:
    """The accuracies of every method that can read these updates, and of chance."""
    victim, defense, threat = parts(cfg, dataset, seed)
    local = FedSGD(batch_size=size)
    rules = Rules(victim=victim, defense=defense, local=local, executor=Loop(), seed=seed)
    params, buffers = victim.initial()
    clients = tuple(range(updates))
    cohort = Cohort(
        round_index=0, clients=clients, weights=(size,) * updates, source=dataset.train,
        steps=tuple((batch(dataset, size, classes, seed, size, c),) for c in clients),
    )  # fmt: skip
    server = Server(params, buffers, defense.init_server(params))
    transcript = play_round(rules, server, {}, cohort, observed=clients).transcript
    assert transcript is not None
    found: Accuracies = {name: [] for name in (*INFERRED, CHANCE)}
    for client in clients:
        seen, truth = threat.observe(transcript, cohort, client, local=local), cohort.truth((client,)).labels
        guess = torch.randint(dataset.num_classes, (size,), generator=stream(seed, "chance", size, client))
        found[CHANCE].append(accuracy(guess, truth))
        for name in INFERRED:
            try:
                labels = METHODS[name](seen, victim)
            except IncompatibleError:
                continue
            assert labels is not None
            found[name].append(accuracy(labels, truth))
    return found


def cell(values: Sequence[float]) -> str:
    summary = summarize(values, statistic="mean")
    if summary is None:
        return "–"
    if summary.low is None or summary.high is None or summary.low == summary.high:
        return f"{summary.value:.2f}"
    return f"{summary.value:.2f} [{summary.low:.2f}, {summary.high:.2f}]"


def table(title: str, by_size: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    lines = [f"**{title}**", "", f"| method | {' | '.join(f'B = {size}' for size in by_size)} |"]
    lines.append("|---|" + "---:|" * len(by_size))
    lines += [
        f"| `{name}` | {' | '.join(cell(found[name]) for found in by_size.values())} |" for name in (*INFERRED, CHANCE)
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--all", default="dataset=cifar10")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--classes", type=int, nargs="+", default=[10])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    loaded: dict[str, Dataset] = {}
    for setting in options.settings or ["model=lenet"]:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            cfg = compose("config", [*options.all.split(), *setting.split(), "threat=curious_server"])
        key = str(cfg.dataset)
        if key not in loaded:
            loaded[key] = instantiate(cfg.dataset, _convert_="all")
        for classes in options.classes:
            sizes = {
                size: measure(cfg, loaded[key], size, classes, options.updates, derive(options.seed, setting, classes))
                for size in options.sizes
            }
            text = table(f"{setting}, {classes} classes per batch, {options.updates} updates per cell", sizes)
            print(text, flush=True) if not sys.stdout.isatty() else Console().print(Markdown(text))


if __name__ == "__main__":
    main()
