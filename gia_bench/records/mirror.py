"""A view of the records for people who look while a run goes on: W&B, CSV or nothing. Never the only copy."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol, final

from gia_bench.errors import ConfigError, StorageError, choices
from gia_bench.records.runs import write_atomic
from gia_bench.records.schema import Record
from gia_bench.records.store import read

MODES = ("offline", "online")


class Mirror(Protocol):
    """Shows what the record file already holds."""

    def show(self, records: Sequence[Record]) -> None:
        """Records that were just written."""
        ...

    def show_images(self, path: Path, round_index: int) -> None:
        """A file of private images and reconstructions that was just written."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


@final
class NoMirror:
    """Shows nothing."""

    def show(self, records: Sequence[Record]) -> None:
        """Nothing."""

    def show_images(self, path: Path, round_index: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@final
class CsvMirror:
    """``metrics.csv``: one row per round, a column per metric, medians over victims; written when the run ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def show(self, records: Sequence[Record]) -> None:
        """Nothing yet: the file is made from all records."""

    def show_images(self, path: Path, round_index: int) -> None:
        """A CSV file shows no images."""

    def close(self) -> None:
        """Write the file, whether the run was resumed or not. A warning says where that fails: the run is done."""
        try:
            self._write()
        except StorageError as error:
            warnings.warn(f"{error} records.jsonl is complete without it.", UserWarning, stacklevel=2)

    def _write(self) -> None:
        frame = read(self.folder / "records.jsonl").dropna(subset=["value", "round"])
        column = frame["metric"].where(frame["attack"].isna(), frame["attack"] + "/" + frame["metric"])
        table = frame.assign(column=column).pivot_table(
            index="round", columns="column", values="value", aggfunc="median"
        )
        write_atomic(self.folder / "metrics.csv", table.to_csv().encode())


@final
class WandbMirror:
    """Weights & Biases through Lightning's logger: metrics, a table of all records of attacks, and image grids.

    The first failure is told in a warning and ends the mirror; records.jsonl is complete without it. For that
    reason the Trainer does not get the logger: a broken W&B would end the training.
    """

    def __init__(self, **init: Any) -> None:
        self._init = init
        self._logger: Any = None
        self._attacked: list[Record] = []
        self._broken = False

    def show(self, records: Sequence[Record]) -> None:
        """Medians over victims by round, and a growing table of what the attacks got."""
        new = [r for r in records if r.attack is not None]
        self._attacked += new
        for step, values in _by_round(records).items():
            self._log("log_metrics", values, step=step)
        if new:
            columns = ["round", "client", "victim", "attack", "metric", "value", "unit", "status", "reason"]
            rows = [[getattr(r, c) for c in columns] for r in self._attacked]
            self._log("log_table", key="leakage", columns=columns, data=rows)

    def show_images(self, path: Path, round_index: int) -> None:
        """Private images, then reconstructions."""
        self._guard(lambda: self._show_images(path))

    def _show_images(self, path: Path) -> None:
        from gia_bench.records.images import load_images

        pair = load_images(path)
        both = {"private": pair.truth, "rebuilt": pair.reconstruction.nan_to_num()}
        grid = [image for images in both.values() for image in images.permute(0, 2, 3, 1).numpy()]
        names = [f"{name} {i}" for name, images in both.items() for i in range(len(images))]
        self._log("log_image", key=f"images/{path.stem}", images=grid, caption=names)

    def close(self) -> None:
        """Let W&B finish its files, broken or not: the next run of a sweep must not get this one's W&B run."""
        if self._logger is not None:
            self._guard(lambda: self._logger.experiment.finish(), last=True)

    def _log(self, method: str, *args: Any, **kwargs: Any) -> None:
        self._guard(lambda: getattr(self._started(), method)(*args, **kwargs))

    def _started(self) -> Any:
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        if self._logger is None:
            settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30)
            self._logger = WandbLogger(experiment=wandb.init(settings=settings, **self._init))
        return self._logger

    def _guard(self, action: Callable[[], object], last: bool = False) -> None:
        if self._broken and not last:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 (whatever breaks in W&B, a record must never be lost by it)
            known, self._broken = self._broken, True
            if not known:
                cause = " ".join(str(error).split())
                warnings.warn(f"W&B stopped ({cause}); records.jsonl goes on without it.", UserWarning, stacklevel=2)


def _by_round(records: Sequence[Record]) -> dict[int, dict[str, float]]:
    """Per round, ``metric`` or ``attack/metric`` -> the median over its records that have a value."""
    values: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        if r.value is not None and r.round is not None:
            values[r.round][r.metric if r.attack is None else f"{r.attack}/{r.metric}"].append(r.value)
    return {step: {name: median(v) for name, v in metrics.items()} for step, metrics in values.items()}


class MirrorFactory(Protocol):
    """Makes a mirror once the run's folder and configuration are known."""

    def __call__(self, folder: Path, run_id: str, config: dict[str, Any]) -> Mirror: ...


def no_logger() -> MirrorFactory:
    """``logger=none``."""
    return lambda folder, run_id, config: NoMirror()


def csv_logger() -> MirrorFactory:
    """``logger=csv``: a table under the run's folder."""
    return lambda folder, run_id, config: CsvMirror(folder)


def wandb_logger(mode: str, project: str, entity: str | None) -> MirrorFactory:
    """``logger=wandb``; mode: "offline" or "online". Raises ``ConfigError`` where wandb is not installed."""
    if mode not in MODES:
        raise ConfigError(choices("logger.mode", mode, MODES))
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "logger=wandb needs the package wandb, which is not installed: pip install wandb, or take logger=csv or "
            "logger=none."
        ) from error
    return lambda folder, run_id, config: WandbMirror(
        project=project,
        entity=entity,
        name=run_id,
        id=run_id,
        dir=str(folder),
        mode=mode,
        config=config,
        resume="allow",
    )
