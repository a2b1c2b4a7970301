"""What every attack of an honest server rebuilds: runs experiment=attacks by batch size, on trained and untrained
models, and against Top-k and DGP, with and without knowing them; prints the table and draws the pictures. Finished runs
are skipped, so that it may be stopped and started again.

    python scripts/attacks.py dataset.verify=false

Attacks are shorter than their papers, so that two CPU cores can run the list in two hours: STEPS says how long.
Malicious servers, generators, learned inverters and label inference have measurements of their own in docs/results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

STEPS = {
    "dlg": 50, "dlg_one_at_a_time": 50, "idlg": 50, "cpl": 50, "dga": 50,
    "inverting_gradients": 2400, "inverting_gradients_adaptive": 2400, "gia": 2400, "gradinversion": 2400, "sgi": 2400,
}  # fmt: skip
"""Outer L-BFGS steps (20 evaluations each), or Adam steps."""

ANY_BATCH = ["dlg", "dlg_one_at_a_time", "dga", "inverting_gradients", "gia", "gradinversion"]
TRAINED = "model.checkpoint=${paths.data}/weights/cifar10_resnet/resnet20-12fca82f.th"


def launch(*attacks: str) -> list[str]:
    """The words for these attacks at their length."""
    return [f"attack=[{','.join(attacks)}]", *(f"attack.{a}.steps={STEPS[a]}" for a in attacks if a in STEPS)]


def settings() -> Iterator[list[str]]:
    """The words of every run."""
    yield launch(*ANY_BATCH, "cpl", "idlg")
    for threat, adaptive in (("curious_server_labels", []), ("adaptive_labels", ["inverting_gradients_adaptive"])):
        for defense in ("none", "top_k", "dgp"):
            if (threat, defense) != ("curious_server_labels", "none"):
                yield [
                    f"threat={threat}",
                    f"defense={defense}",
                    *launch("dlg", "inverting_gradients", "gia", "sgi", *adaptive),
                ]
    for model, attack in (("mlp", "analytic"), ("cnn6", "rgap"), ("vit_april", "april")):
        # U(-0.5, 0.5) saturates wide layers: a client that is right already would send zeros
        yield [f"model={model}", "model.normalize=true", "model.init=default", *launch(attack)]
    yield launch("sgi")
    for batch_size in (2, 4, 8):
        yield [*launch(*ANY_BATCH), f"fl.local.batch_size={batch_size}"]
    for checkpoint in ("model.checkpoint=null", TRAINED):
        # in evaluation mode, as Geiping et al. attack; the attacked update is the one trained with
        yield [
            "model=resnet20",
            "model.init=default",
            "model.training=false",
            checkpoint,
            "attack=[inverting_gradients]",
            "attack.inverting_gradients.steps=500",  # of a network with a hundred times LeNet's work
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", default="outputs", help="where runs are kept")
    parser.add_argument("--report", default=None, help="where the table and pictures go (beside the runs)")
    parser.add_argument("overrides", nargs="*", help="more settings for every run")
    chosen = parser.parse_args()
    failed = []
    for words in settings():
        command = ["experiment=attacks", *words, *chosen.overrides]
        ended = subprocess.run(
            [sys.executable, "-m", "gia_bench", *command, f"paths.outputs={chosen.outputs}"], check=False
        )
        if ended.returncode:
            failed.append(" ".join(command))
    print(f"{len(failed)} runs failed", *failed, sep="\n")
    report = ["-c", "from gia_bench.report.app import main; main()", f"runs=[{chosen.outputs}/attacks]"]
    subprocess.run(
        [
            sys.executable,
            *report,
            "table=attacks",
            "figure=[reconstructions]",
            f"output={chosen.report or f'{chosen.outputs}/attacks/report'}",
        ],
        check=True,
    )


if __name__ == "__main__":
    main()
