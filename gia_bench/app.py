"""The command line: compose, run, and say what happened in sentences.

torch is imported when a run begins, so that help and misspelt choices are answered at once.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from functools import partial
from typing import Any, ClassVar, final

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gia_bench.conf_path import CONF
from gia_bench.errors import GiaBenchError
from gia_bench.errors import choices as choices_of


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _hydra_main(cfg: DictConfig) -> str:
    from gia_bench.config import build, identify
    from gia_bench.run import execute

    context = HydraConfig.get()
    words, sweeping = list(context.overrides.task), context.mode == RunMode.MULTIRUN
    try:
        run = identify(cfg, dict(context.runtime.choices))
        return execute(run, partial(build, cfg), words, sweeping=sweeping)
    except (GiaBenchError, OSError) as error:
        if sweeping:
            raise  # Hydra notes which run it was and goes on with the next
        raise SystemExit(f"gia-bench: {sentence(error)}") from error


@final
class SweepSummary(Callback):
    """Counts how the runs of a sweep ended, skipped and failed ones included."""

    # of the class, since Hydra makes the object and ends a sweep with failures without another call
    states: ClassVar[Counter[str]] = Counter()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        returned = job_return._return_value
        self.states[returned if isinstance(returned, str) else "failed"] += 1

    @classmethod
    def show(cls) -> None:
        """Print the counts of a sweep; nothing for a single run."""
        if cls.states.total() > 1:
            counts = ", ".join(f"{n} {state}" for state, n in sorted(cls.states.items()))
            print(f"{cls.states.total()} runs: {counts}")


def main() -> None:
    """The console script ``gia-bench``; problems a user can mend are one sentence and exit status 1."""
    try:
        run_as_command(_hydra_main, "gia-bench")
    finally:
        SweepSummary.show()


def run_as_command(entry: Any, name: str) -> None:
    """Run a Hydra entry and turn mendable errors into a sentence on stderr."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors arrive here instead of being printed by Hydra
    if not os.environ.get("GIA_BENCH_DATA", "unset"):
        del os.environ["GIA_BENCH_DATA"]  # set but empty: not the current folder
    try:
        entry()
    except ValueError as error:
        if "Config group override" not in str(error):  # Hydra's, for group=null
            raise
        print(f"{name}: A group takes a choice, not null: leave it out, or see {name} --help.", file=sys.stderr)
        sys.exit(1)
    except (GiaBenchError, HydraException, OmegaConfBaseException, OSError) as error:
        print(f"{name}: {sentence(error)}", file=sys.stderr)
        sys.exit(1)


def sentence(error: BaseException) -> str:
    """The error's own words, and what can be chosen instead: the keys beside an unknown key, the choices of a group."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_choice(error.missing_cfg_file)
    if isinstance(error, OSError) and error.filename:
        return (
            f"{error.filename}: {error.strerror}. Free some space, or choose another folder with paths.outputs=...; "
            "then start the same command again."
        )
    text = str(error).partition("\nConfig search path:")[0].strip()
    parent = getattr(error.__cause__, "parent_node", None)
    if isinstance(parent, DictConfig):
        text += f"\nThere are: {', '.join(sorted(str(k) for k in parent))}"
    return text


def _unknown_choice(missing: str) -> str:
    group, _, name = missing.rpartition("/")
    if group == "hydra/launcher":
        return f"The launcher {name} is not installed: pip install 'gia-bench[slurm]' or 'gia-bench[ray]'."
    known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return choices_of(group or "config", name.removesuffix(".yaml"), known)
