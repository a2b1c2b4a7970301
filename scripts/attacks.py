"""What every attack of an honest server rebuilds: runs experiment=attacks in parts, prints a table of each and draws
its pictures. Finished runs are skipped, so that it may be stopped and started again.

    python scripts/attacks.py dataset.verify=false                          all of it
    python scripts/attacks.py --only defended,trained dataset.verify=false  some of it

Attacks are shorter than their papers, so that two CPU cores can run the list in two hours: STEPS says how long.
Malicious servers, generators, learned inverters and label inference have measurements of their own in docs/results.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

STEPS = {
    "dlg": 50, "dlg_one_at_a_time": 50, "idlg": 50, "cpl": 50, "dga": 50, "dga_muted": 50,
    "inverting_gradients": 2400, "inverting_gradients_adaptive": 2400, "gia": 2400, "gia_muted": 2400, "sgi": 2400,
    "gradinversion": 2400, "gradinversion_dgp_paper": 2400, "inverting_gradients_dgp_paper": 2400,
    "inverting_gradients_fedavg": 2400, "inverting_gradients_fedavg_epochs": 2400, "april_optimized": 500,
    "gia_paper": 2400, "gradinversion_paper": 2400,
}  # fmt: skip
"""Outer L-BFGS steps (20 evaluations each), or Adam steps."""

SMOOTH = "inverting_gradients_dgp_paper"
"""Inverting Gradients with a strong prior: the settings of DGP's authors."""
ANY_BATCH = ("dlg", "dlg_one_at_a_time", "dga", "inverting_gradients", SMOOTH, "gia", "gradinversion")
ONE = ("dlg", "idlg", "cpl", "dga", "dga_muted", "inverting_gradients", "gia", "gia_muted", "sgi")
CLOSED_FORMS = (("mlp", "analytic"), ("cnn6", "rgap"), ("vit_april", "april"))
TRAINED = "model.checkpoint=${paths.data}/weights/cifar10_resnet/resnet20-12fca82f.th"


def launch(*attacks: str, steps: int | None = None) -> list[str]:
    """The words for these attacks at their length, or at another one."""
    lengths = {a: steps or STEPS[a] for a in attacks if a in STEPS}
    return [f"attack=[{','.join(attacks)}]", *(f"attack.{a}.steps={n}" for a, n in lengths.items())]


def closed_forms() -> Iterator[list[str]]:
    for model, attack in CLOSED_FORMS:
        # U(-0.5, 0.5) saturates wide layers: a client that is right already would send zeros
        yield [f"model={model}", "model.normalize=true", "model.init=default", *launch(attack)]


def defended() -> Iterator[list[str]]:
    """Every attack that one image and one round suffice for, without a defense and under Top-k and DGP, by attackers
    who do not know the defense and by such who do. (GradInversion's own weights fit no network of this size.)"""
    for threat, more in (("curious_server_labels", ()), ("adaptive_labels", ("inverting_gradients_adaptive",))):
        for defense in ("none", "top_k", "dgp"):
            words = [f"threat={threat}", f"defense={defense}"]
            yield [*words, *launch(*ONE, *more)]
            # closed forms make no use of the defense
            yield from ([*words, *closed] for closed in closed_forms() if not more)


def presets() -> Iterator[list[str]]:
    """The settings of the authors of DGP, with all their steps of Inverting Gradients, and GradInversion with its
    gradient weighed 1,000 times: with its own weight, for a ResNet-50, this network's update counts for nothing. APRIL
    by search on a network of its own."""
    weighed = ("gradinversion", "gradinversion_dgp_paper")
    for threat, defense in itertools.product(("curious_server_labels", "adaptive_labels"), ("none", "top_k", "dgp")):
        words = [f"threat={threat}", f"defense={defense}"]
        yield [*words, *launch(SMOOTH, steps=12_000)]
        yield [*words, *launch(*weighed), *(f"attack.{attack}.distance.factor=0.05" for attack in weighed)]
        yield [
            *words, "model=vit_april", "model.normalize=true", "model.init=default", *launch("april_optimized"),
        ]  # fmt: skip


def papers() -> Iterator[list[str]]:
    """What papers say where their authors' code does something else."""
    yield [*launch("gia_paper", "gradinversion_paper"), "attack.gradinversion_paper.distance.factor=0.05"]


def batches() -> Iterator[list[str]]:
    """One, two, four and eight images an update."""
    for batch_size in (1, 2, 4, 8):
        yield [*launch(*ANY_BATCH), f"fl.local.batch_size={batch_size}", "attack.gradinversion.distance.factor=0.05"]


def trained() -> Iterator[list[str]]:
    """One image an update, as a federation of 100 clients trains the network; with the strong prior under
    prunings too."""
    for words in (
        launch("dlg", "idlg", "cpl", "inverting_gradients", SMOOTH, "gia", "sgi"),
        *(["threat=adaptive_labels", f"defense={name}", *launch(SMOOTH)] for name in ("top_k", "dgp")),
    ):
        yield [
            *words, "partition.num_clients=100", "partition.samples_per_client=null", "fl.rounds=401",
            "fl.eval_every=100", "fl.attack_rounds=[0,100,400]",
        ]  # fmt: skip


def convnet() -> Iterator[list[str]]:
    """GradDefense's attack on a ConvNet with 16 channels in evaluation mode, its last layer muted or not."""
    for defense in ("none", "soteria"):
        yield [
            f"defense={defense}", "model=convnet64", "model.network.width=16", "model.init=default",
            "model.training=false", *launch("gia", "gia_muted", steps=1000),
        ]  # fmt: skip


def residual() -> Iterator[list[str]]:
    """ResNet-20 in evaluation mode, as Geiping et al. attack; the attacked update is the one trained with."""
    for checkpoint in ("model.checkpoint=null", TRAINED):
        # fewer steps, of a network with a hundred times LeNet's work
        yield ["model=resnet20", "model.init=default", "model.training=false", checkpoint,
               *launch("inverting_gradients", steps=500)]  # fmt: skip


def batch_norm() -> Iterator[list[str]]:
    """GradInversion where it belongs: a trained network with BatchNorm, in both modes, batches of four."""
    for training in ("true", "false"):
        yield [
            "model=resnet20", "model.init=default", f"model.training={training}", TRAINED, "partition.num_clients=5",
            "fl.attack_clients=5", "fl.local.batch_size=4", "attack.gradinversion.restarts=2",
            *launch("inverting_gradients", "gradinversion", steps=1000),
        ]  # fmt: skip


def fedavg() -> Iterator[list[str]]:
    """Weight updates of several local steps: of one image, of four, and of four in an order that nobody knows; with
    labels that nobody shows; those of one image under Top-k and DGP too."""
    work = (("none", 1, 1, 5), ("none", 4, 4, 5), ("none", 4, 2, 2), ("top_k", 1, 1, 5), ("dgp", 1, 1, 5))
    threats = ("curious_server_labels", "curious_server", "adaptive_labels")
    attacks = ("inverting_gradients", "inverting_gradients_fedavg", "inverting_gradients_fedavg_epochs", SMOOTH)
    for (defense, examples, batch_size, epochs), threat in itertools.product(work, threats):
        if threat == (
            "adaptive_labels" if defense == "none" else "curious_server"
        ):  # there is nothing to know, or more
            continue
        yield [
            f"threat={threat}", f"defense={defense}", "fl=fedavg",
            "fl.rounds=1", "fl.eval_every=1", "fl.attack_rounds=[0]", "fl.attack_clients=20",
            f"partition.samples_per_client={examples}", f"fl.local.batch_size={batch_size}",
            f"fl.local.epochs={epochs}", "fl.local.learning_rate=0.01",
            # as many steps of an update that costs up to five times as much
            *launch(*attacks, steps=1200),
            "attack.inverting_gradients.replay._target_=gia_bench.attacks.replay.OneStep",
            "attack.inverting_gradients.priors.total_variation.weight=1.0e-6",  # as the others have
        ]  # fmt: skip


class Part(NamedTuple):
    """settings: the words of every run; rows: what the table tells apart beside model, threat, defense and attack."""

    settings: Callable[[], Iterator[list[str]]]
    rows: Sequence[str] = ()


PARTS = {
    "defended": Part(defended),
    "presets": Part(presets),
    "papers": Part(papers),
    "convnet": Part(convnet),
    "batches": Part(batches, ["fl.local.batch_size"]),
    "trained": Part(trained, ["round"]),
    "residual": Part(residual, ["model.checkpoint"]),
    "batch_norm": Part(batch_norm, ["model.training"]),
    "fedavg": Part(fedavg, ["partition.samples_per_client", "fl.local.batch_size"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", default="outputs", help="where runs are kept")
    parser.add_argument("--report", default=None, help="where the tables and pictures go (beside the runs)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("overrides", nargs="*", help="more settings for every run")
    chosen = parser.parse_intermixed_args()
    unknown = [name for name in chosen.only.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--only {','.join(unknown)} is not known; choose from {','.join(PARTS)}")
    failed = []
    for name in chosen.only.split(","):
        for words in PARTS[name].settings():
            command = ["experiment=attacks", f"name=attacks_{name}", *words, *chosen.overrides]
            ended = subprocess.run(
                [sys.executable, "-m", "gia_bench", *command, f"paths.outputs={chosen.outputs}"], check=False
            )
            if ended.returncode:
                failed.append(" ".join(command))
        rows = ",".join(["model", *PARTS[name].rows, "threat", "defense", "attack"])
        runs, output = f"{chosen.outputs}/attacks_{name}", f"{chosen.report or chosen.outputs}/attacks_{name}/report"
        report = [
            sys.executable, "-c", "from gia_bench.report.app import main; main()", f"runs=[{runs}]", "table=attacks",
            f"table.rows=[{rows}]", "figure=[reconstructions]", f"output={output}",
        ]  # fmt: skip
        # the next part is measured all the same
        if subprocess.run(report, check=False).returncode:
            failed.append(f"the report of {name}")
    print(f"{len(failed)} runs or reports failed", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
