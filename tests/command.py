"""``gia-bench`` in a process of its own, forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

MAINS = {
    "gia-bench": "gia_bench.app", "gia-bench-report": "gia_bench.report.app",
    "gia-bench-prior": "gia_bench.generators.app",
}  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*MAINS.values(), "gia_bench.run", "sklearn.datasets"])


class Finished(NamedTuple):
    """status: the exit status, negative for a signal; out, err: what was printed."""

    status: int
    out: str
    err: str


def _child(arguments: list[str], before: Callable[[], None] | None, environment: dict[str, str], logs: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    sys.argv = arguments
    if before is not None:
        before()
    import_module(MAINS[arguments[0]]).main()


def run(
    *arguments: str, before: Callable[[], None] | None = None, environment: dict[str, str] | None = None
) -> Finished:
    """``arguments`` as on a command line, the program's name first. before: called in the new process (sabotage)."""
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=_child, args=(list(arguments), before, environment or {}, Path(folder)))
        process.start()
        process.join()
        assert process.exitcode is not None
        return Finished(process.exitcode, *((Path(folder) / name).read_text() for name in ("out", "err")))


def gia_bench(outputs: Path, *overrides: str, **kwargs: object) -> Finished:
    """A run of ``gia-bench`` below ``outputs``, without W&B."""
    return run("gia-bench", f"paths.outputs={outputs}", "logger=none", "trainer=cpu", *overrides, **kwargs)  # type: ignore[arg-type]


SMALL: Sequence[str] = (
    "dataset=digits", "model=mlp", "fl.rounds=3", "fl.eval_every=2", "partition.num_clients=4", "fl.local.batch_size=2",
    "metrics.lpips=null", "attack=[inverting_gradients_fast]", "attack.inverting_gradients_fast.steps=5",
)  # fmt: skip
"""A run of a second."""
