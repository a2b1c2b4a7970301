"""What every defense leaks and costs: runs an experiment for all of them and three seeds, prints the table and draws
the pictures. Finished runs are skipped, so that it may be stopped and started again.

    python scripts/defenses.py                                              Fashion-MNIST, dlg and inverting_gradients
    python scripts/defenses.py --experiment defenses_cifar10                the same on CIFAR-10
    python scripts/defenses.py --experiment defenses_standard --seeds 0     attack=standard, which knows the defense
"""

from __future__ import annotations

import argparse
import subprocess
import sys

SETTINGS: tuple[tuple[str, ...], ...] = (
    ("none",),
    ("dgp",),
    ("dgp", "defense.error_feedback.enabled=false"),
    ("adgp",),
    ("top_k",),
    ("top_k", "defense.error_feedback.enabled=false"),
    ("gradient_compression",),
    ("random_k",),
    ("half_precision",),
    ("int8",),
    ("qsgd",),
    ("sign_sgd",),
    ("gaussian_noise", "defense.variance=1e-2"),
    ("laplace_noise", "defense.variance=1e-2"),
    ("dp_sgd",),
    ("client_dp",),
    ("soteria",),
    ("graddefense", "defense.compensation=null", "defense.risk.every=50"),
    ("graddefense", "defense.compensation.variance=exact", "defense.risk.every=50"),
    ("outpost",),
    ("precode",),
    ("ats",),
    ("mixup",),
    ("instahide",),
    ("priprune_fixed",),
    ("censor",),
)
"""A defense and its settings: those of the papers' tables, and what decides between them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="defenses", help="defenses, defenses_cifar10, defenses_standard")
    parser.add_argument("--outputs", default="outputs", help="where runs are kept")
    parser.add_argument("--report", default=None, help="where the table and pictures go (beside the runs)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=None, help="some of the defenses, with commas between them")
    parser.add_argument("overrides", nargs="*", help="more settings for every run, such as fl.rounds=100")
    chosen = parser.parse_args()
    name, only = chosen.experiment, chosen.only and chosen.only.split(",")
    failed = []
    for seed in chosen.seeds.split(","):
        for defense, *settings in SETTINGS:
            if only and defense not in only:
                continue
            words = [f"experiment={name}", f"defense={defense}", *settings, f"seed={seed}", *chosen.overrides]
            ended = subprocess.run(
                [sys.executable, "-m", "gia_bench", *words, f"paths.outputs={chosen.outputs}"], check=False
            )
            if ended.returncode:
                failed.append(" ".join(words))
    print(f"{len(failed)} runs failed", *failed, sep="\n")
    table, attack = ("standard", "standard") if name == "defenses_standard" else ("defenses", "inverting_gradients")
    report = ["-c", "from gia_bench.report.app import main; main()", f"runs=[{chosen.outputs}/{name}]"]
    pictures = [
        "figure.reconstructions.clients=5",
        f"+figure.reconstructions.filters.attack=[{attack}]",
        f"+figure.reconstructions.filters.seed=[{chosen.seeds.split(',')[0]}]",
    ]
    output = f"output={chosen.report or f'{chosen.outputs}/{name}/report'}"
    subprocess.run([sys.executable, *report, f"table={table}", *pictures, output], check=True)


if __name__ == "__main__":
    main()
