"""The command ``gia-bench-report``: a table and pictures from finished runs."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import cast

import hydra
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from gia_bench.conf_path import CONF
from gia_bench.errors import GiaBenchError
from gia_bench.records.runs import write_atomic
from gia_bench.report.figures import FigureSpec
from gia_bench.report.render import to_csv, to_markdown, to_rich, wide_enough
from gia_bench.report.results import Results
from gia_bench.report.tables import TableSpec, build


def report(folders: list[Path], spec: TableSpec | None, figures: list[FigureSpec], output: Path) -> list[Path]:
    """Print the table, write it as Markdown and CSV, draw the figures as PNG; the files written. A figure that cannot
    be drawn takes nothing from what stands before it.

    Raises ``MissingCellError`` with the command to run where the records do not fill a cell, ``StorageError`` where
    there are no records or ``output`` cannot be written.
    """
    results = Results.load(folders)
    written: list[Path] = []

    def keep(name: str, content: bytes) -> None:
        write_atomic(output / name, content)
        written.append(output / name)

    if spec is not None:
        table = build(spec, results)
        view = to_rich(table)
        wide_enough(Console(), view).print(view)
        keep(f"{spec.name}.md", to_markdown(table).encode())
        keep(f"{spec.name}.csv", to_csv(table).encode())
    for figure in figures:
        keep(f"{figure.name}.png", _png(figure.draw(results)))
    return written


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, bbox_inches="tight")  # row names may reach past the edge
    return content.getvalue()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def _hydra_main(cfg: DictConfig) -> None:
    made = instantiate(cfg, _convert_="all")
    figures = cast("list[FigureSpec]", list(made["figure"].values()))
    try:
        written = report([Path(folder) for folder in made["runs"]], made.get("table"), figures, Path(made["output"]))
    except GiaBenchError as error:
        print(f"gia-bench-report: {error}", file=sys.stderr)  # here, since Hydra would put its own words before it
        raise SystemExit(1) from error
    for path in written:
        print(path)


def _choices(group: str) -> str:
    """The choices of a config group, for the help: Hydra would list all groups, also those of training."""
    return ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


OmegaConf.register_new_resolver("gia_bench.choices", _choices, replace=True)


def main() -> None:
    """The console script; a problem the user can mend is one sentence and exit status 1."""
    from gia_bench.app import run_as_command

    # Hydra reads null in a config, but not as a group's choice on the command line
    sys.argv = ["table=[]" if word == "table=null" else word for word in sys.argv]
    run_as_command(_hydra_main, "gia-bench-report")
