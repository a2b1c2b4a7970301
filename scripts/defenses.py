"""What every defense leaks and costs: runs an experiment for all of them and three seeds, prints the table and draws
the pictures. Finished runs are skipped, so that it may be stopped and started again.

    python scripts/defenses.py                                              Fashion-MNIST, dlg and inverting_gradients
    python scripts/defenses.py --experiment defenses_cifar10                the same on CIFAR-10
    python scripts/defenses.py --experiment defenses_standard --seeds 0     attack=standard, which knows the defense
    python scripts/defenses.py --experiment defenses_pruned                 every pruning=, and PriPrune over some
    python scripts/defenses.py --experiment defenses_pruned dataset=cifar10 dataset.verify=false    the same on CIFAR-10
    python scripts/defenses.py --experiment defenses_standard --seeds 0 dataset=cifar10 dataset.verify=false    CIFAR-10
    python scripts/defenses.py --experiment defenses_sum --seeds 0          the mean of all clients, masked and not
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

ALL: tuple[tuple[str, ...], ...] = (
    ("defense=none",),
    ("defense=dgp",),
    ("defense=dgp", "defense.error_feedback.enabled=false"),
    ("defense=adgp",),
    ("defense=top_k",),
    ("defense=top_k", "defense.error_feedback.enabled=false"),
    ("defense=gradient_compression",),
    ("defense=random_k",),
    ("defense=threshold",),
    ("defense=half_precision",),
    ("defense=half_precision", "defense.dtype=bfloat16"),
    ("defense=int8",),
    ("defense=int8", "defense.rounding=stochastic"),
    ("defense=qsgd",),
    ("defense=sign_sgd",),
    ("defense=gaussian_noise", "defense.variance=1e-2"),
    ("defense=laplace_noise", "defense.variance=1e-2"),
    ("defense=clip",),
    ("defense=dp_sgd",),
    ("defense=client_dp",),
    ("defense=soteria",),
    ("defense=soteria", "defense.directions=8"),
    ("defense=graddefense", "defense.compensation=null", "defense.risk.every=50"),
    ("defense=graddefense", "defense.compensation.variance=exact", "defense.risk.every=50"),
    ("defense=graddefense_clipped",),
    ("defense=graddefense_layers",),
    ("defense=outpost",),
    ("defense=precode",),
    ("defense=ats",),
    ("defense=mixup",),
    ("defense=instahide",),
    ("defense=priprune_fixed",),
    ("defense=priprune",),
    ("defense=censor",),
    ("defense=chain", "defense.stages.first.max_norm=4", "defense.stages.second.variance=1e-2"),
    ("defense=chain", "defense@defense.stages.first=dgp", "defense@defense.stages.second=int8"),
)
"""A defense and its settings: those of the papers' tables, and what decides between them."""

METHODS = ("random", "snip", "grasp", "synflow", "feddst")
HALF = {method: (f"pruning={method}", "pruning.density=0.5") for method in METHODS}
"""Half of the weights: with a fifth, no method leaves this small network anything to learn with in 200 rounds."""

WHOLE, LAID_OVER = ("pruning=none",), ("priprune_fixed", "priprune")
PRUNED = (
    *((*pruning, "defense=none") for pruning in (WHOLE, *HALF.values(), ("pruning=prunefl",))),
    *((*pruning, f"defense={name}") for pruning in (WHOLE, HALF["snip"]) for name in LAID_OVER),
)
"""A pruning and what is laid over it."""

SUM = (("aggregation=plain", "defense=none"), ("aggregation=secure", "defense=none"))
"""What a server sees that sees the mean alone."""


class Experiment(NamedTuple):
    """settings: the words of every run; choice: the experiment they are added to; table, rows: of the report (None: the
    table's own rows); attack: whose reconstructions are drawn."""

    settings: Sequence[tuple[str, ...]]
    choice: str
    table: str = "defenses"
    rows: str | None = None
    attack: str = "inverting_gradients"


EXPERIMENTS = {
    "defenses": Experiment(ALL, "defenses"),
    "defenses_cifar10": Experiment(ALL, "defenses_cifar10"),
    "defenses_standard": Experiment(ALL, "defenses_standard", table="standard", attack="standard"),
    "defenses_pruned": Experiment(PRUNED, "defenses_pruned", table="pruned", attack="sgi"),
    "defenses_sum": Experiment(
        tuple(("threat=secure_aggregation", *words) for words in SUM), "defenses", rows="aggregation,defense,attack"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="defenses", choices=[*EXPERIMENTS])
    parser.add_argument("--outputs", default="outputs", help="where runs are kept")
    parser.add_argument("--report", default=None, help="where the table and pictures go (beside the runs)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=None, help="some of the defenses, with commas between them")
    parser.add_argument("overrides", nargs="*", help="more settings for every run, such as fl.rounds=100")
    chosen = parser.parse_intermixed_args()
    name, only = chosen.experiment, chosen.only and chosen.only.split(",")
    experiment, failed = EXPERIMENTS[name], []
    for seed in chosen.seeds.split(","):
        for settings in experiment.settings:
            if only and not any(f"defense={defense}" in settings for defense in only):
                continue
            words = [f"experiment={experiment.choice}", f"name={name}", *settings, f"seed={seed}", *chosen.overrides]
            ended = subprocess.run(
                [sys.executable, "-m", "gia_bench", *words, f"paths.outputs={chosen.outputs}"], check=False
            )
            if ended.returncode:
                failed.append(" ".join(words))
    print(f"{len(failed)} runs failed", *failed, sep="\n")
    report = ["-c", "from gia_bench.report.app import main; main()", f"runs=[{chosen.outputs}/{name}]"]
    words = [f"table={experiment.table}", *([f"table.rows=[{experiment.rows}]"] if experiment.rows else [])]
    pictures = [
        "figure.reconstructions.clients=5",
        f"+figure.reconstructions.filters.attack=[{experiment.attack}]",
        f"+figure.reconstructions.filters.seed=[{chosen.seeds.split(',')[0]}]",
    ]
    output = f"output={chosen.report or f'{chosen.outputs}/{name}/report'}"
    subprocess.run([sys.executable, *report, *words, *pictures, output], check=True)


if __name__ == "__main__":
    main()
