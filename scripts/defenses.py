"""What every defense leaks and costs: runs experiment=defenses for all of them and three seeds, prints the table and
draws the pictures. Finished runs are skipped, so that it may be stopped and started again.

    python scripts/defenses.py --outputs outputs --report outputs/defenses/report
"""

from __future__ import annotations

import argparse
import subprocess
import sys

SETTINGS: tuple[tuple[str, ...], ...] = (
    ("none",),
    ("dgp",),
    ("dgp", "defense.error_feedback.enabled=false"),
    ("top_k",),
    ("half_precision",),
    ("gaussian_noise", "defense.variance=1e-2"),
    ("soteria",),
    ("adgp",),
    ("gradient_compression",),
    ("graddefense", "defense.compensation=null", "defense.risk.every=50"),
    ("graddefense", "defense.compensation.variance=exact", "defense.risk.every=50"),
    ("ats",),
    ("precode",),
    ("dp_sgd",),
)
"""A defense and its settings: those of the papers' tables, and what decides between them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", default="outputs", help="where runs are kept")
    parser.add_argument("--report", default="outputs/defenses/report", help="where the table and pictures go")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("overrides", nargs="*", help="more settings for every run, such as fl.rounds=100")
    chosen = parser.parse_args()
    failed = []
    for seed in chosen.seeds.split(","):
        for defense, *settings in SETTINGS:
            words = ["experiment=defenses", f"defense={defense}", *settings, f"seed={seed}", *chosen.overrides]
            ended = subprocess.run(
                [sys.executable, "-m", "gia_bench", *words, f"paths.outputs={chosen.outputs}"], check=False
            )
            if ended.returncode:
                failed.append(" ".join(words))
    print(f"{len(failed)} runs failed", *failed, sep="\n")
    report = ["-c", "from gia_bench.report.app import main; main()", f"runs=[{chosen.outputs}/defenses]"]
    subprocess.run([sys.executable, *report, "table=defenses", f"output={chosen.report}"], check=True)


if __name__ == "__main__":
    main()
