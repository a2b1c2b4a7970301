"""Tables from records: what a row is, what a column measures, and what must not be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import pandas as pd

from gia_bench.errors import ConfigError, choices
from gia_bench.metrics.statistics import STATISTICS, Statistic, Summary, summarize
from gia_bench.records.schema import METRICS
from gia_bench.report.control import check_control, failed_control
from gia_bench.report.results import MissingCellError, Results

ROUNDS = ("row", "all", "last")
SHOWS = ("number", "percent", "bytes", "seconds")


@final
@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of a table.

    statistic: median or mean, over all records of a cell; round: those of the row's round ("row"), of all rounds, or
    the last one of each run; attack: only of this attack (None: the row's); show: number, percent, bytes or seconds,
    with ``digits``; interval: whether to show the 95 % interval and the number of victims, or "student_t" for that
    interval of a mean over seeds; dense: the metric of the
    bytes without compression, to show what is saved. Raises ``ConfigError`` for a name that does not exist.
    """

    metric: str
    title: str
    statistic: Statistic = "median"
    round: str = "row"
    attack: str | None = None
    show: str = "number"
    digits: int = 2
    interval: bool | str = False
    dense: str | None = None

    def __post_init__(self) -> None:
        for name, got, known in (
            ("metric", self.metric, METRICS),
            ("dense", self.dense or self.metric, METRICS),
            ("statistic", self.statistic, STATISTICS),
            ("round", self.round, ROUNDS),
            ("show", self.show, SHOWS),
        ):
            if got not in known:
                raise ConfigError(choices(f"column {self.title}: {name}", got, known))
        if self.interval not in (False, True, "student_t"):
            raise ConfigError(
                f"column {self.title}: interval={self.interval!r} is not known. Choose one of: false, student_t, true."
            )
        if self.interval == "student_t" and self.statistic != "mean":
            raise ConfigError(f"column {self.title}: interval=student_t is of a mean; take statistic=mean.")


@final
@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """rows: the keys that make a row, of a record or dotted paths into the config; columns: by a name of their own;
    control: what the row without a defense has, None for tables without a control; baseline: metric -> the metric that
    the control has to beat in the median for its rows to say anything (None: none); filters: key -> value or values.
    """

    name: str
    title: str
    rows: Sequence[str]
    columns: Mapping[str, Column]
    control: Mapping[str, Any] | None = None
    baseline: Mapping[str, str] | None = field(default_factory=dict)
    filters: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Cell:
    """summary: None where no record has a value; dense: the same statistic of the dense bytes; reasons: why values
    are absent, each once.
    """

    summary: Summary | None
    num_failed: int
    num_unavailable: int
    dense: float | None
    reasons: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """A finished table: per row its key values and its cells by column. notes: runs that gave nothing, and why."""

    spec: TableSpec
    rows: tuple[tuple[tuple[Any, ...], Mapping[str, Cell]], ...]
    notes: tuple[str, ...]


def build(spec: TableSpec, results: Results) -> Table:
    """Fill ``spec`` from ``results``.

    A run that did not end contributes nothing but a note. Raises ``MissingCellError`` with the command to run where a
    row has no undefended control or a cell no record, and ``ConfigError`` where a cell would pool runs of different
    conditions.
    """
    left_out = [run for run_id, run in results.runs.items() if run_id not in results.ended.runs]
    notes = [
        f"run {run.run_id} is left out ({run.status['state']}): {run.status['reason'] or 'it has not ended'}"
        for run in left_out
    ]
    if len(left_out) == len(results.runs):
        command = results.command(left_out[0].run_id)
        raise MissingCellError(f"table {spec.name}: no run has ended; {notes[0]}. To go on with it: {command}")
    results = results.ended
    chosen = results.where(spec.filters, spec.rows)
    rows = _rows(spec, chosen)
    if not rows:
        raise MissingCellError(
            f"table {spec.name}: no record has {' and '.join(spec.rows)}. Start a run with an attack: gia-bench "
            "'attack=[inverting_gradients]' defense=none"
        )
    filled = [(tuple(row.values()), _cells(spec, chosen, row, rows)) for row in rows]
    return Table(spec=spec, rows=tuple(filled), notes=tuple(notes))


def _rows(spec: TableSpec, results: Results) -> list[dict[str, Any]]:
    """Every combination of row keys that occurs; the control first, then in the order of their values."""
    named = [key for key in spec.rows if "." not in key]
    combinations = results.frame.dropna(subset=named)[list(spec.rows)].drop_duplicates()
    rows = [{str(k): None if pd.isna(v) else v for k, v in row.items()} for row in combinations.to_dict("records")]
    return sorted(rows, key=lambda row: (not _is_control(spec, row), [_order(value) for value in row.values()]))


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return (not number, float(value) if number else 0.0, str(value))


def _is_control(spec: TableSpec, row: Mapping[str, Any]) -> bool:
    return spec.control is not None and all(row.get(key) == value for key, value in spec.control.items())


def _cells(spec: TableSpec, results: Results, row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Cell]:
    frame = results.frame
    members = frame[_matches(frame, row, or_null=False)]["run_id"].unique().tolist()
    controls = _controls(spec, results, row, rows, members)
    _check_pool(spec, results, row, members)
    own = frame[frame["run_id"].isin(members)]
    cells = {name: _cell(spec, results, own, row, column) for name, column in spec.columns.items()}
    attacks = _attacks(row)
    theirs = frame[frame["run_id"].isin(controls) & frame["attack"].isin(attacks)]
    doubt = failed_control(theirs, spec.baseline or {}, ", ".join(attacks))
    return {name: _doubted(cell, spec.columns[name], doubt) for name, cell in cells.items()}


def _doubted(cell: Cell, column: Column, doubt: str | None) -> Cell:
    """A number about the leak, with what is to be held against it."""
    leak = column.round == "row" and METRICS[column.metric].better_for_defender is not None
    return replace(cell, reasons=(*cell.reasons, doubt)) if doubt and leak and cell.summary else cell


def _matches(frame: pd.DataFrame, row: Mapping[str, Any], *, or_null: bool) -> pd.Series[bool]:
    matches = pd.Series(True, index=frame.index)
    for key, value in row.items():
        same = frame[key].isna() if value is None else (frame[key] == value).fillna(False).astype(bool)
        matches &= same | frame[key].isna() if or_null else same
    return matches


def _cell(spec: TableSpec, results: Results, own: pd.DataFrame, row: dict[str, Any], column: Column) -> Cell:
    place = row | ({"attack": column.attack} if column.attack else {})
    place = {key: value for key, value in place.items() if column.round == "row" or key != "round"}
    records = own[_matches(own, place, or_null=True)]
    measured = _of(records, column.metric, column)
    if measured.empty:
        raise MissingCellError(_missing(spec, results, row, column, own["run_id"].iloc[0]))
    values = measured["value"].dropna()
    failed, unavailable = (measured[measured["status"] == status] for status in ("failed", "unavailable"))
    dense = _of(records, column.dense, column)["value"].dropna() if column.dense else values.iloc[:0]
    return Cell(
        summary=summarize(
            values.tolist(),
            statistic=column.statistic,
            num_failed=len(failed),
            interval="student_t" if column.interval == "student_t" else "bootstrap",
        ),
        num_failed=len(failed),
        num_unavailable=len(unavailable),
        dense=None if dense.empty else float(STATISTICS[column.statistic](dense)),
        reasons=tuple(dict.fromkeys([*unavailable["reason"], *failed["reason"]])),
    )


def _of(records: pd.DataFrame, metric: str, column: Column) -> pd.DataFrame:
    measured = records[records["metric"] == metric]
    if column.round == "last":
        return measured[measured["round"] == measured.groupby("run_id")["round"].transform("max")]
    return measured


def _attacks(row: Mapping[str, Any]) -> list[str]:
    return [row["attack"]] if row.get("attack") else []


def _name(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in row.items())


def _missing(spec: TableSpec, results: Results, row: dict[str, Any], column: Column, run_id: str) -> str:
    run = results.runs[run_id]
    reason = f" ({run.status['reason']})" if run.status["reason"] else ""
    again = {"force": "true"} if run.status["state"] == "done" else {}
    return (
        f"table {spec.name}: {_name(row)} has no {column.metric}. Its run {run_id} is {run.status['state']}{reason}. "
        f"Leave the column out, or see that the metric is chosen and run: {results.command(run_id, **again)}"
    )


def _controls(
    spec: TableSpec, results: Results, row: dict[str, Any], rows: list[dict[str, Any]], members: list[str]
) -> list[str]:
    """The control's runs: the same experiment, seed by seed, with nothing changed but the defense."""
    if spec.control is None:
        return []
    if _is_control(spec, row):
        return members
    # defense.k1 is a setting of this defense: its control has none
    shared = [key for key in row if key.partition(".")[0] not in spec.control]
    frame = results.frame

    def controls_of(one: dict[str, Any]) -> list[dict[str, Any]]:
        return [other for other in rows if _is_control(spec, other) and all(other[key] == one[key] for key in shared)]

    controls = controls_of(row)
    if controls:
        theirs = [run for other in controls for run in frame[_matches(frame, other, or_null=False)]["run_id"].unique()]
        what = f"table {spec.name}: {_name(row)}"
        check_control(
            results, what, members, theirs, control=spec.control, attacks=_attacks(row), filters="table.filters"
        )
        return theirs
    run_id = members[0]
    changes = {key: str(value) for key, value in spec.control.items()}
    if row.get("attack"):
        # one run makes all that these defended runs lack
        alike = [other for other in rows if {**other, "attack": None} == {**row, "attack": None}]
        changes["attack"] = f"[{','.join(other['attack'] for other in alike if not controls_of(other))}]"
    raise MissingCellError(
        f"table {spec.name}: {_name(row)} has no control with {_name(spec.control)}, and without one its numbers say "
        f"nothing about the defense. Run: {results.command(run_id, **changes)}"
    )


def _check_pool(spec: TableSpec, results: Results, row: dict[str, Any], members: list[str]) -> None:
    differing = results.differences(members, _attacks(row))
    if differing:
        apart = ",".join([*spec.rows, next(iter(differing))])
        raise ConfigError(
            f"table {spec.name}: {_name(row)} would pool {len(members)} runs that differ in {', '.join(differing)}. "
            f"Keep them apart with 'table.rows=[{apart}]'; or, " + results.way_out(members, differing, "table.filters")
        )
    seeds = results.frame[results.frame["run_id"].isin(members)].groupby("run_id")["seed"].first()
    if seeds.duplicated().any():
        raise ConfigError(
            f"table {spec.name}: {_name(row)} would count seed {seeds[seeds.duplicated()].iloc[0]} twice, in the runs "
            f"{', '.join(members)}. Name one of them in runs=..."
        )
