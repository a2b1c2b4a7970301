"""Records of several runs as one table that knows what may be pooled."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import pandas as pd
import yaml

from gia_bench.conf_path import CONF
from gia_bench.errors import ConfigError, GiaBenchError, StorageError, choices
from gia_bench.records.runs import Run, find_runs
from gia_bench.records.schema import KEYS
from gia_bench.records.store import read

# what two runs of one condition may differ in
_NEUTRAL = ("seed", "name", "paths", "trainer", "logger", "launcher", "force", "images", "metrics")

# groups whose choice says in one word what runs differ in
_CHOICES = ("dataset", "model", "fl", "threat")


class MissingCellError(GiaBenchError):
    """A table or a figure lacks something. The sentence ends with the command that makes it."""


@final
@dataclass(frozen=True, eq=False)
class Results:
    """runs: by run id; frame: one row per record."""

    runs: Mapping[str, Run]
    frame: pd.DataFrame

    @classmethod
    def load(cls, folders: Path | Iterable[Path]) -> Results:
        """Everything below ``folders``. Raises ``StorageError`` where nothing is, or where a run lies there twice."""
        places = [folders] if isinstance(folders, Path) else list(folders)
        found = find_runs(places)
        runs: dict[str, Run] = {}
        for run in found:
            if run.run_id in runs:
                raise StorageError(
                    f"Run {run.run_id} lies in {runs[run.run_id].folder} and in {run.folder}: its records would count "
                    "twice. Name one of them in runs=..."
                )
            runs[run.run_id] = run
        frame = read([run.records for run in found if run.records.exists()])
        if frame.empty:
            raise StorageError(
                f"There are no records in {', '.join(map(str, places))}. Start a run with gia-bench, or set runs=..."
            )
        return cls(runs, frame)

    def where(self, filters: Mapping[str, Any], keys: Sequence[str] = ()) -> Results:
        """The records that pass ``filters`` (key -> value or list of values), with a column for each of ``keys``.

        A key is one of a record's or a dotted path into a run's config (``defense.k1``), nested or not. A record to
        which a key does not apply (a test accuracy has no attack) passes. Raises ``ConfigError`` for an unknown key.
        """
        frame, wanted_by = self.frame, dict(_leaves(filters))
        for key in dict.fromkeys([*keys, *wanted_by]):
            if key not in frame.columns:
                frame = frame.assign(**{key: frame["run_id"].map(self._setting(key))})
        for key, wanted in wanted_by.items():
            values = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
            applies = frame[key].isin(values)
            frame = frame[applies | frame[key].isna()] if key in KEYS else frame[applies]
        return Results({run_id: self.runs[run_id] for run_id in frame["run_id"].unique()}, frame)

    @cached_property
    def ended(self) -> Results:
        """The runs that are done, and their records: half a run is no number."""
        runs = {run_id: run for run_id, run in self.runs.items() if run.status["state"] == "done"}
        return Results(runs, self.frame[self.frame["run_id"].isin(runs)])

    def differences(self, run_ids: Iterable[str], attacks: Collection[str] = ()) -> dict[str, list[Any]]:
        """Settings in which runs differ -> their values, but for the seed, what follows it, and what leaves numbers
        alone.

        With ``attacks``, the settings of other attacks do not count.
        """
        run_ids = list(run_ids)
        flat = [self._flat[run_id] for run_id in run_ids]
        keys = dict.fromkeys(key for settings in flat for key in settings)
        others = [k for k in keys if attacks and k.startswith("attack.") and k.split(".")[1] not in attacks]
        values = {key: list(dict.fromkeys(str(s.get(key)) for s in flat)) for key in keys if key not in others}
        differing = {key: different for key, different in values.items() if len(different) > 1}
        return {key: different for key, different in differing.items() if not self._follows_the_seed(key, run_ids)}

    def way_out(self, run_ids: Iterable[str], differing: Mapping[str, Sequence[Any]], filters: str) -> str:
        """How to choose among runs that differ, for the end of a sentence: one of several experiments, or by the first
        setting. filters: the key that filters take."""
        key, values = next(iter(differing.items()))
        by_setting = f"choose with +{filters}.{key}={values[0]} or runs=..."
        folders = list(dict.fromkeys(self.runs[run_id].folder.parent for run_id in run_ids))
        if len(folders) == 1:
            return by_setting
        return f"they are of {len(folders)} experiments; take one with 'runs=[{folders[0]}]', or {by_setting}"

    def _follows_the_seed(self, key: str, run_ids: Iterable[str]) -> bool:
        """Whether it is a part's seed (``pruning.seed``), and every run's own wherever it is set."""
        of_runs = [(self._flat[run_id].get(key), self.runs[run_id].config.get("seed")) for run_id in run_ids]
        return key.endswith(".seed") and all(part in (None, seed) for part, seed in of_runs)

    @cached_property
    def labels(self) -> dict[str, str]:
        """Run id -> its defense, the choices in which runs of this defense differ (``model=mlp``), and the settings in
        which those of the same choices do."""
        choices = self.frame.groupby("run_id")[["defense", *_CHOICES]].first()
        labels = {}
        for defense, members in choices.groupby("defense"):
            named = [group for group in _CHOICES if members[group].nunique() > 1]
            for run_id, own in members.iterrows():
                alike = members.index[(members[named] == own[named]).all(axis=1)]
                differing = [key for key in self.differences(alike) if not key.startswith("attack.")]
                settings = self._told(differing, self._flat[str(run_id)], [self._flat[other] for other in alike])
                labels[str(run_id)] = " ".join([str(defense), *(f"{g}={own[g]}" for g in named), *settings])
        return labels

    @staticmethod
    def _told(differing: list[str], own: Mapping[str, Any], all_runs: list[Mapping[str, Any]]) -> list[str]:
        """The differing settings in words: ``k1=0.05``; ``compensation`` or ``no compensation`` for a whole part."""
        told: dict[str, str] = {}
        for key in differing:
            part = key.removeprefix("defense.").split(".")[0]
            keys = [k for k in differing if k.removeprefix("defense.").split(".")[0] == part and "." in k]
            if len(keys) > 1 and any(all(run.get(k) is None for k in keys) for run in all_runs):
                told[part] = part if any(own.get(k) is not None for k in keys) else f"no {part}"
            else:
                told[key] = f"{key.removeprefix('defense.')}={own.get(key)}"
        return list(told.values())

    def command(self, run_id: str, **changes: str) -> str:
        """The command line that starts this run again with ``changes`` (group -> choice)."""
        words = self.runs[run_id].status.get("overrides")
        if words is None:
            own = self.frame[self.frame["run_id"] == run_id]
            words = [f"{key}={own[key].iloc[0]}" for key in ("dataset", "model", "fl", "threat", "defense", "seed")]
            words.append(f"attack=[{','.join(own['attack'].dropna().unique())}]")
        kept = [word for word in words if not _replaced(word.lstrip("+~").partition("=")[0], changes)]
        return shlex.join(["gia-bench", *kept, *(f"{key}={value}" for key, value in changes.items())])

    def _setting(self, key: str) -> dict[str, Any]:
        found = {run_id: _lookup(run.config, key) for run_id, run in self.runs.items()}
        if not any(_holds(run.config, key) for run in self.runs.values()) and not _in_some_choice(key):
            raise ConfigError(choices("key", key, [*KEYS, "a setting such as defense.k1"]))
        return {run_id: str(value) if isinstance(value, (list, dict)) else value for run_id, value in found.items()}

    @cached_property
    def _flat(self) -> dict[str, dict[str, Any]]:
        return {run_id: _settings(run.config) for run_id, run in self.runs.items()}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What numbers depend on, by dotted path. Files below paths.data are the same wherever that is, and a loop and
    ``vmap`` give the same numbers."""
    leaves = dict(_leaves({key: value for key, value in config.items() if key not in _NEUTRAL}))
    leaves = {k: v for k, v in leaves.items() if k != "dataset.download" and not k.startswith("fl.executor.")}
    data = str(_lookup(config, "paths.data"))
    return {key: value.removeprefix(data) if isinstance(value, str) else value for key, value in leaves.items()}


def _replaced(key: str, changes: Mapping[str, str]) -> bool:
    """Whether a word on the command line falls to ``changes``: the group's choice, and the old choice's settings."""
    group, _, setting = key.partition(".")
    group = group.partition("@")[0]  # defense@defense.stages.first
    if group == "attack" and setting:
        # an attack that is launched again keeps its settings
        return group in changes and setting.partition(".")[0] not in changes[group].strip("[]").split(",")
    return group in changes


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _in_some_choice(key: str) -> bool:
    """Whether a choice of the group that ``key`` begins with has this setting, although no run here does."""
    group, _, setting = key.partition(".")
    return bool(setting) and any(_file_holds(file, setting) for file in (CONF / group).glob("*.yaml"))


def _file_holds(file: Path, setting: str) -> bool:
    """Whether a choice has a setting, its own or of what its defaults put in a place (``/defense@stages.first``)."""
    config = yaml.safe_load(file.read_text())
    if _holds(config, setting):
        return True
    for entry in config.get("defaults", ()):
        named, choice = next(iter(entry.items())) if isinstance(entry, Mapping) else (None, entry)
        source, _, place = (named or choice).partition("@")
        part = CONF / source.lstrip("/") / f"{choice}.yaml" if named else file.parent / f"{source}.yaml"
        inner = setting if place == "_here_" else setting.removeprefix(f"{place}.")
        if part.is_file() and (place == "_here_" or inner != setting) and _file_holds(part, inner):
            return True
    return False


def _holds(config: Any, key: str) -> bool:
    """Whether there is such a setting, be it null."""
    *path, last = key.split(".")
    node = _lookup(config, ".".join(path)) if path else config
    return isinstance(node, Mapping) and last in node


def _leaves(node: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        found += _leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else [(f"{path}{key}", value)]
    return found
