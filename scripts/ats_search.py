"""Search a policy for ATS: python scripts/ats_search.py --dataset digits --schemes 8   (--help for the rest)

Draws random sub-policies, scores each for privacy (on a model trained a little) and for accuracy (on an untrained one),
and prints them ranked. With the numbers of the paper it is 1600 schemes, 5 images per class of CIFAR-100,
10 runs and a model trained for 100 epochs on a tenth of the data; the defaults here finish within a minute.
"""

from __future__ import annotations

import argparse
from statistics import fmean, pvariance

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gia_bench.conf_path import CONF
from gia_bench.data.source import Dataset, Source
from gia_bench.defenses.ats import ATS, parse
from gia_bench.defenses.ats_search import (
    Ranking,
    Scored,
    accuracy_score,
    one_per_class,
    privacy_scores,
    random_schemes,
    transformed,
)
from gia_bench.models.build import build_victim
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Params


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="a file of conf/dataset")
    parser.add_argument("--model", default="lenet_zhu", help="a file of conf/model")
    parser.add_argument("--schemes", type=int, default=8, help="random sub-policies (paper: 1600)")
    parser.add_argument("--policy", nargs="*", default=[], help="sub-policies to score besides the random ones")
    parser.add_argument("--images", type=int, default=10, help="for the privacy score (paper: 5 per class)")
    parser.add_argument("--runs", type=int, default=3, help="of the accuracy score, 100 images each (paper: 10)")
    parser.add_argument("--pretrain-steps", type=int, default=100, help="SGD steps before the privacy score")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--alpha", type=float, default=0.7, help="weight of privacy against its variance")
    parser.add_argument("--min-accuracy", type=float, help="lowest that is kept (paper: -85); default: no policy's")
    parser.add_argument("--crop-and-flip", action="store_true", help="random crop and mirroring first, as in the paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("override", nargs="*", help="Hydra overrides: paths.data=... model.network.width=16")
    return parser.parse_intermixed_args()


def examples(source: Source, count: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Images [n, C, H, W] and labels [n], chosen at random; at most as many as there are."""
    chosen = torch.randperm(len(source), generator=stream(seed, name))[:count]
    return source.images(chosen), source.labels[chosen]


def pretrained(victim: Victim, source: Source, steps: int, rate: float, seed: int) -> tuple[Params, Buffers]:
    """Plain SGD, batches of 64 from a tenth of the data."""
    params, buffers = victim.initial()
    images, labels = examples(source, max(len(source) // 10, 1), seed, "pretrain")
    generator = stream(seed, "batches")
    step = torch.func.grad(victim.objective, has_aux=True)
    for _ in range(steps):
        rows = torch.randint(len(labels), (min(64, len(labels)),), generator=generator)
        gradient, buffers = step(params, buffers, Batch(images[rows], labels[rows], torch.ones(len(rows))))
        params = {k: p - rate * gradient[k] for k, p in params.items()}
    return params, buffers


def main() -> None:
    chosen = options()
    seed = chosen.seed
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", [f"dataset={chosen.dataset}", f"model={chosen.model}", *chosen.override])
    try:
        dataset: Dataset = instantiate(cfg.dataset, _convert_="all")
    except InstantiationException as error:
        raise SystemExit(f"ats_search: {error.__cause__ or error}") from error
    victim = build_victim(
        **instantiate(cfg.model, _convert_="all"), input_shape=dataset.shape, num_classes=dataset.num_classes,
        mean=dataset.mean, std=dataset.std, seed=seed,
    )  # fmt: skip
    untrained = victim.initial()
    trained = pretrained(victim, dataset.train, chosen.pretrain_steps, chosen.learning_rate, seed)
    images, labels = examples(dataset.test, chosen.images, seed, "privacy")
    starts = torch.rand(images.shape, generator=stream(seed, "noise"))
    runs = [examples(dataset.test, 100, seed, f"accuracy {r}") for r in range(chosen.runs)]

    def scored(policy: str) -> Scored:
        ats = ATS(policy=policy, crop_and_flip=chosen.crop_and_flip)
        ats.check_victim(victim)
        changed = transformed(ats, images, stream(seed, "transform", policy))
        privacy = privacy_scores(victim, *trained, changed, labels, starts).tolist()
        accuracy = []
        for r, (pictures, classes) in enumerate(runs):
            different = pictures[one_per_class(classes)]
            accuracy.append(
                accuracy_score(victim, *untrained, transformed(ats, different, stream(seed, "accuracy", policy, r)))
            )
        return Scored(policy=policy, privacy=fmean(privacy), variance=pvariance(privacy), accuracy=fmean(accuracy))

    for policy in chosen.policy:
        parse(policy)
    schemes = [*chosen.policy, *random_schemes(chosen.schemes, stream(seed, "schemes"))]
    # solarize 0 leaves every level as it is: what no policy at all would score
    plain = scored("28")
    least = plain.accuracy if chosen.min_accuracy is None else chosen.min_accuracy
    show([scored(policy) for policy in dict.fromkeys(schemes)], plain, Ranking(alpha=chosen.alpha, min_accuracy=least))


def show(everything: list[Scored], plain: Scored, ranking: Ranking) -> None:
    best = ranking.sort(everything)
    table = Table("policy", "privacy ↓", "variance ↓", "accuracy ↑", "value ↓", title="Best first")
    left = sorted((s for s in everything if s not in best), key=ranking.value)
    for name, row in [*((s.policy, s) for s in best), *((f"{s.policy} (too low)", s) for s in left), ("none", plain)]:
        numbers = (row.privacy, row.variance, row.accuracy, ranking.value(row))
        table.add_row(name, *(f"{n:.4f}" if abs(n) < 100 else f"{n:.4g}" for n in numbers))
    Console().print(table)
    if best:
        two = "+".join(s.policy for s in best[:2])
        print(f"defense=ats defense.policy={two}")
    else:
        print(f"No sub-policy reaches an accuracy score of {ranking.min_accuracy:.4g}; lower --min-accuracy.")


if __name__ == "__main__":
    main()
