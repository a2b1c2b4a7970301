"""Whether defended runs may stand beside undefended ones: the same experiment, seed by seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from gia_bench.errors import ConfigError
from gia_bench.records.schema import METRICS
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
        way_out = results.way_out([*members, *controls], differing, filters)
        raise ConfigError(f"{what} and its control differ in {', '.join(differing)} and cannot be compared: {way_out}")
    seeds = results.frame.groupby("run_id")["seed"].first()
    alone = set(seeds[list(members)]) - set(seeds[list(controls)])
    if alone:
        seed = str(min(alone))
        again = results.command(members[0], **{key: str(value) for key, value in control.items()}, seed=seed)
        raise MissingCellError(f"{what} has no control with seed={seed}. Run: {again}")


def failed_control(controls: pd.DataFrame, baseline: Mapping[str, str], attack: str) -> str | None:
    """Why the undefended control says nothing, or None: in the median it does not beat its baseline.

    controls: its records; baseline: metric -> the metric it has to beat; higher is taken to be better for an attack.
    """
    for metric, flat in baseline.items():
        medians = controls[controls["metric"].isin([metric, flat])].groupby("metric")["value"].median()
        if metric in medians and flat in medians and medians[metric] <= medians[flat]:
            unit = METRICS[metric].unit or ""
            return (
                f"failed control: without a defense {attack} reaches {medians[metric]:.1f} {unit} in the median, and a "
                f"flat image of the right colour {medians[flat]:.1f} {unit}. This says nothing about a defense"
            )
    return None
