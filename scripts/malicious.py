"""What malicious servers rebuild: every attack without a defense, under Top-k and under DGP, and a table of it.
Finished runs are skipped, so that it may be stopped and started again.

    python scripts/malicious.py                            CIFAR-10, LeNet, 20 updates of 8 images
    python scripts/malicious.py --only sum --all 'dataset=digits model.network.width=4'
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gia_bench.metrics import summarize

COMMON = (
    "dataset=cifar10", "dataset.verify=false", "model=lenet", "partition.num_clients=20", "fl.rounds=1",
    "fl.local.batch_size=8", "fl.attack_clients=20", "metrics.lpips=null", "metrics.names=[psnr_db,label_accuracy]",
    "logger=none", "trainer=cpu",
)  # fmt: skip
PARTS: dict[str, tuple[str, ...]] = {
    # every client's own update; the fished ones are rebuilt in 300 steps
    "clients": (
        "threat=malicious_model",
        "attack=[robbing_the_fed,curious_abandon_honesty,loki,class_fishing,feature_fishing]",
        "attack.loki.num_bins=128", "attack.class_fishing.attack.steps=300", "attack.feature_fishing.attack.steps=300",
        "attack.feature_fishing.fish=others",
    ),
    # as the authors of DGP planted it
    "dgp_paper": (
        "threat=malicious_model", "attack=[robbing_the_fed_dgp_paper]", "model=resnet32", "fl.local.batch_size=9",
    ),
    # the sum over the 20 clients
    "sum": ("threat=malicious_aggregate", "attack=[loki,robbing_the_fed]", "attack.loki.num_bins=128"),
    # the same after four local steps of each
    "sum_fedavg": (
        "threat=malicious_aggregate", "attack=[loki]", "attack.loki.num_bins=128", "fl=fedavg",
        "fl.local.learning_rate=0.01", "partition.samples_per_client=32",
    ),
    # clients with eight images of one class; those of class 3 are fished
    "one_class": (
        "threat=malicious_params", "attack=[feature_fishing]", "attack.feature_fishing.attack.steps=300",
        "attack.feature_fishing.target_class=3", "partition=classes_per_client", "partition.classes_per_client=1",
        "partition.samples_per_class=[8,8]", "partition.num_clients=200", "fl.attack_clients=200",
    ),
}  # fmt: skip
DEFENSES = "none,top_k,dgp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", default="outputs", help="where runs are kept")
    parser.add_argument("--only", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--defenses", default=DEFENSES)
    parser.add_argument("--all", default="", help="more settings for every run")
    chosen = parser.parse_args()
    print("| part | attack | defense | images | PSNR dB, median | a flat image | above 60 dB | above 20 dB | none |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for part in chosen.only:
        name = f"malicious_{part}"
        words = [*COMMON, *PARTS[part], f"name={name}", *chosen.all.split(), f"defense={chosen.defenses}"]
        subprocess.run(
            [sys.executable, "-m", "gia_bench", "-m", *words, f"paths.outputs={chosen.outputs}"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for line in rows(part, Path(chosen.outputs, name)):
            print(line, flush=True)


def rows(part: str, folder: Path) -> list[str]:
    """A line for each attack and defense: over all images of attacked updates, those without a reconstruction apart."""
    records: list[dict[str, Any]] = [
        json.loads(line) for path in folder.glob("*/records.jsonl") for line in path.read_text().splitlines()
    ]
    values: dict[str, dict[tuple[str, str], list[float | None]]] = {"psnr_db": {}, "oracle_flat_psnr_db": {}}
    for r in records:
        if r["metric"] in values:
            values[r["metric"]].setdefault((r["attack"], r["defense"]), []).append(r["value"])
    lines = []
    for (attack, defense), every in sorted(values["psnr_db"].items()):
        found = [v for v in every if v is not None]
        told = summarize(found)
        flat = summarize([v for v in values["oracle_flat_psnr_db"].get((attack, defense), []) if v is not None])
        median = "–" if told is None else f"{told.value:.1f} [{told.low:.1f}, {told.high:.1f}]"
        if defense == "none" and told is not None and flat is not None and told.value <= flat.value:
            median += ": failed control"
        baseline = "–" if flat is None else f"{flat.value:.1f}"
        above = [f"{sum(v > least for v in found) / max(len(found), 1):.0%}" for least in (60, 20)]
        lines.append(
            f"| {part} | {attack} | {defense} | {len(found)} | {median} | {baseline} | {above[0]} | {above[1]} "
            f"| {len(every) - len(found)} |"
        )
    return lines


if __name__ == "__main__":
    main()
