"""Whether defended runs may stand beside undefended ones: the same experiment, seed by seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gia_bench.errors import ConfigError
from gia_bench.report.results import MissingCellError, Results


def check_control(
    results: Results,
    what: str,
    members: Sequence[str],
    controls: Sequence[str],
    *,
    control: Mapping[str, Any],
    attacks: Collection[str],
    filters: str,
) -> None:
    """Nothing but the settings in ``control`` may tell ``controls`` from ``members``, and no seed may be without one.

    what: whose control it is, and filters: the key with which to choose other runs, for the sentences; attacks: whose
    settings count, all where empty. Raises ``ConfigError`` for another experiment, ``MissingCellError`` with the
    command for a seed.
    """
    differing = results.differences([*members, *controls], attacks)
    differing = {key: values for key, values in differing.items() if key.partition(".")[0] not in control}
    if differing:
        key, values = next(iter(differing.items()))
        raise ConfigError(
            f"{what} and its control differ in {', '.join(differing)} and cannot be compared. Choose with "
            f"+{filters}.{key}={values[0]} or runs=..."
        )
    seeds = results.frame.groupby("run_id")["seed"].first()
    alone = set(seeds[list(members)]) - set(seeds[list(controls)])
    if alone:
        seed = str(min(alone))
        again = results.command(members[0], **{key: str(value) for key, value in control.items()}, seed=seed)
        raise MissingCellError(f"{what} has no control with seed={seed}. Run: {again}")
