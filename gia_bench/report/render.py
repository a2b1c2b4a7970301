"""A finished table as text: for the terminal, as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any, Literal, final

from rich import box
from rich import table as rich_table
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

from gia_bench.records.schema import METRICS
from gia_bench.report.tables import Cell, Column, Table

ARROWS = {"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓", None: ""}
_UNLIMITED = 100_000  # columns
LEGEND = (
    "↑ ↓: better for the defender. [low, high]: 95 % bootstrap interval over n victims; failed ones are not among n."
)


@final
class _Footnotes:
    """Numbers sentences in the order in which they are first used."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def mark(self, sentence: str) -> str:
        if sentence not in self.sentences:
            self.sentences.append(sentence)
        return f"({self.sentences.index(sentence) + 1})"

    def lines(self) -> list[str]:
        return [f"({number}) {sentence}" for number, sentence in enumerate(self.sentences, 1)]


def to_rich(table: Table) -> rich_table.Table:
    """For the console that ``wide_enough`` gives; intervals stand below their number to keep it narrow."""
    header, body, footer = _text(table)
    # Text: in a plain string rich reads "[low, high]" as markup
    title, below = Text(table.spec.title), Text("\n".join(footer))
    view = rich_table.Table(title=title, caption=below, caption_justify="left", box=box.SIMPLE_HEAD)
    view.pad_edge, view.collapse_padding = False, True
    for name in header:
        justify: Literal["left", "right"] = "left" if name in table.spec.rows else "right"
        view.add_column(Text(name.replace(" ", "\n", 1)), justify=justify, no_wrap=True)
    for row in body:
        view.add_row(*(Text(cell.replace(" [", "\n[").replace("] n=", "]\nn=").replace(" (", "\n(")) for cell in row))
    return view


def wide_enough(console: Console, view: rich_table.Table) -> Console:
    """``console``, or a wider one on the same stream: rich would cut the numbers of a table that is too wide."""
    needed = Measurement.get(console, console.options.update(width=_UNLIMITED), view).maximum
    return console if needed <= console.width else Console(file=console.file, width=needed)


def to_markdown(table: Table) -> str:
    """A title, the table, and its footnotes."""
    header, body, footer = _text(table)
    rule = ["---" if name in table.spec.rows else "---:" for name in header]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *body)]
    return "\n".join([f"### {table.spec.title}", "", *lines, "", *(f"{line}  " for line in footer), ""])


def to_csv(table: Table) -> str:
    """One line per row; every column as value, low, high, n, failed, unavailable and reason, numbers in full."""
    parts = ("", "_low", "_high", "_n", "_failed", "_unavailable", "_reason")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*table.spec.rows, *(f"{name}{part}" for name in table.spec.columns for part in parts)])
    for keys, cells in table.rows:
        writer.writerow([*keys, *(number for cell in cells.values() for number in _numbers(cell))])
    return stream.getvalue()


def _numbers(cell: Cell) -> list[Any]:
    s = cell.summary
    numbers = [s.value, s.low, s.high, s.num_victims] if s else [None, None, None, 0]
    return [*numbers, cell.num_failed, cell.num_unavailable, "; ".join(cell.reasons)]


def _text(table: Table) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows, and the lines below the table."""
    columns, notes = table.spec.columns, _Footnotes()
    arrows = (ARROWS[METRICS[column.metric].better_for_defender] for column in columns.values())
    header = [*table.spec.rows, *(column.title + arrow for column, arrow in zip(columns.values(), arrows, strict=True))]
    body = [
        ["–" if key is None else str(key) for key in keys]
        + [_cell(cells[name], column, notes) for name, column in columns.items()]
        for keys, cells in table.rows
    ]
    by_t = [c.title for c in columns.values() if c.interval == "student_t"]
    of_means = [f"{', '.join(by_t)}: 95 % interval of the mean by Student's t over n runs."] if by_t else []
    return header, body, [LEGEND, *of_means, *notes.lines(), *table.notes]


def _cell(cell: Cell, column: Column, notes: _Footnotes) -> str:
    marks = "".join(f" {notes.mark(reason)}" for reason in cell.reasons)
    failed = f"{cell.num_failed} failed" if cell.num_failed else ""
    if cell.summary is None:
        return (failed or "n/a") + marks
    s, text = cell.summary, _number(cell.summary.value, column)
    if cell.dense:
        text += f" ({_saving(cell.dense, s.value)})"
    if column.interval and s.low is not None and s.high is not None:
        text += f" [{_number(s.low, column)}, {_number(s.high, column)}]"
    counts = [f"n={s.num_victims}" if column.interval else "", failed]
    counts.append(f"{cell.num_unavailable} unavailable" if cell.num_unavailable else "")
    return " ".join([text, ", ".join(filter(None, counts))]).strip() + marks


def _number(value: float, column: Column) -> str:
    if column.show == "percent":
        return f"{100 * value:.{column.digits}f} %"
    if column.show == "seconds":
        return f"{value:.{column.digits}f} s"
    if column.show == "bytes":
        return _bytes(value)
    return f"{value:.{column.digits}f}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        # 999.95 would round to 1000.0
        if abs(value) < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _saving(dense: float, value: float) -> str:
    if value == dense:
        return "dense"
    return f"{dense / value:.1f}x less" if 0 < value < dense else f"{value / dense:.1f}x dense"
