"""Tables from runs made by hand: victims of 17, 18 and 19 dB without a defense, 10 dB less with one."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run
from rich.console import Console

from gia_bench.errors import ConfigError, StorageError
from gia_bench.records.runs import write_status
from gia_bench.records.schema import Record
from gia_bench.records.store import RecordStore
from gia_bench.report.render import to_csv, to_markdown, to_rich, wide_enough
from gia_bench.report.results import MissingCellError, Results
from gia_bench.report.tables import Column, Table, TableSpec, build

PSNR = Column(metric="psnr_db", title="PSNR dB", digits=1, interval=True)
NO_DEFENSE = {"defense": "none"}


def _spec(*columns: Column, rows: tuple[str, ...] = ("defense", "attack"), **more: Any) -> TableSpec:
    named = {column.title: column for column in columns or (PSNR,)}
    return TableSpec(**{"name": "t", "title": "T", "rows": rows, "columns": named, "control": NO_DEFENSE, **more})


def _table(root: Path, *columns: Column, **more: Any) -> Table:
    return build(_spec(*columns, **more), Results.load(root))


def _lines(table: Table) -> list[str]:
    return [line for line in to_markdown(table).splitlines() if line.startswith("|")][2:]


def test_the_control_comes_first_and_every_cell_says_how_sure_it_is(tmp_path: Path) -> None:
    make_run(tmp_path, "rb", defense="dgp")
    make_run(tmp_path, "ra")
    assert _lines(_table(tmp_path)) == [
        "| none | dlg | 18.0 [17.0, 19.0] n=3 |",
        "| dgp | dlg | 8.0 [7.0, 9.0] n=3 |",
    ]


def test_costs_are_those_of_the_whole_run_whatever_the_attack(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=("dlg", "ig"))
    make_run(tmp_path, "rb", defense="dgp", attacks=("dlg", "ig"))
    columns = (
        Column(metric="test_accuracy", title="acc", statistic="mean", round="last", show="percent", digits=1),
        Column(metric="uplink_bytes", title="up", round="all", show="bytes", dense="dense_uplink_bytes"),
        Column(metric="round_seconds", title="s", round="all", show="seconds", digits=3),
    )
    assert _lines(_table(tmp_path, *columns)) == [
        "| none | dlg | 90.0 % | 1.0 kB (dense) | 0.125 s |",
        "| none | ig | 90.0 % | 1.0 kB (dense) | 0.125 s |",
        "| dgp | dlg | 85.0 % | 100 B (10.0x less) | 0.125 s |",
        "| dgp | ig | 85.0 % | 100 B (10.0x less) | 0.125 s |",
    ]


def test_rounds_can_be_rows_of_their_own(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", rounds=(0, 10))
    accuracy = Column(metric="test_accuracy", title="acc", round="last")
    lines = _lines(_table(tmp_path, PSNR, accuracy, rows=("defense", "attack", "round")))
    assert lines == [
        "| none | dlg | 0 | 18.0 [17.0, 19.0] n=3 | 0.90 |",
        "| none | dlg | 10 | 18.0 [17.0, 19.0] n=3 | 0.90 |",
    ]
    assert _lines(_table(tmp_path)) == ["| none | dlg | 18.0 [17.0, 19.0] n=6 |"]


def test_a_column_can_ask_for_one_attack_of_its_own(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=("dlg", "ig"))
    columns = [Column(metric="psnr_db", title=name, attack=name) for name in ("dlg", "ig")]
    assert _lines(_table(tmp_path, *columns, rows=("defense",))) == ["| none | 18.00 | 18.00 |"]


def test_seeds_are_pooled(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, f"r{seed}", seed=seed)
    assert _lines(_table(tmp_path)) == ["| none | dlg | 18.0 [17.0, 19.0] n=9 |"]


def test_a_parts_seed_that_is_the_runs_own_is_no_other_setting_and_any_other_is(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, f"r{seed}", seed=seed, config={"pruning": {"initial": {"seed": seed}}})
    [line] = _lines(_table(tmp_path))
    assert line.endswith("n=6 |")
    make_run(tmp_path, "r2", seed=2, config={"pruning": {"initial": {"seed": 7}}})
    with pytest.raises(ConfigError, match=r"pool 3 runs that differ in pruning\.initial\.seed"):
        _table(tmp_path)


def test_failed_victims_are_counted_and_unavailable_metrics_explained(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "ra")
    store = RecordStore(folder / "records.jsonl")
    who = {"run_id": "ra", "experiment": "made", "seed": 0, "dataset": "digits", "model": "lenet", "fl": "fedsgd"}
    place = {"threat": "curious_server", "defense": "none", "round": 0, "client": 3, "victim": 4, "attack": "dlg"}
    store.append([Record.of("psnr_db", None, **who, **place, status="failed", reason="diverged")])  # type: ignore[arg-type]
    store.close()
    text = to_markdown(_table(tmp_path, PSNR, Column(metric="lpips_squeeze", title="LPIPS")))
    assert "| none | dlg | 18.0 [17.0, 19.0] n=3, 1 failed (1) | n/a (2) |" in text
    assert "(1) diverged  \n(2) images are too small" in text


def test_arrows_say_what_is_better_for_the_defender(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    columns = (PSNR, Column(metric="lpips_squeeze", title="LPIPS"), Column(metric="test_accuracy", title="acc"))
    header = to_markdown(_table(tmp_path, *columns)).splitlines()[2].replace("\N{NO-BREAK SPACE}", " ")
    assert header == "| defense | attack | PSNR dB ↓ | LPIPS ↑ | acc |"


def test_a_missing_control_names_the_command_that_makes_it(tmp_path: Path) -> None:
    overrides = ["experiment=demo", "defense=dgp", "defense.k1=0.05", "attack=[dlg,ig]", "fl.rounds=5"]
    make_run(tmp_path, "rb", defense="dgp", overrides=overrides)
    with pytest.raises(MissingCellError) as error:
        _table(tmp_path)
    assert "defense=dgp, attack=dlg has no control with defense=none" in str(error.value)
    assert str(error.value).endswith("Run: gia-bench experiment=demo fl.rounds=5 defense=none 'attack=[dlg]'")


def test_without_its_overrides_a_run_is_named_by_its_records(tmp_path: Path) -> None:
    make_run(tmp_path, "rb", defense="dgp", seed=4)
    with pytest.raises(MissingCellError) as error:
        _table(tmp_path)
    words = "gia-bench dataset=digits model=lenet fl=fedsgd threat=curious_server seed=4 defense=none 'attack=[dlg]'"
    assert str(error.value).endswith(words)


def test_a_control_of_another_experiment_is_none(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    make_run(tmp_path, "rb", defense="dgp", settings={"k1": 0.05})
    assert _table(tmp_path).rows
    config = tmp_path / "made" / "ra" / "config.yaml"
    config.write_text(config.read_text() + "model: {width: 99}\n")
    with pytest.raises(ConfigError, match=r"its control differ in model\.width"):
        _table(tmp_path)


def test_a_control_of_another_seed_is_none(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", seed=0)
    make_run(tmp_path, "rb", defense="dgp", seed=5, overrides=["defense=dgp", "attack.dlg.steps=2", "seed=5"])
    with pytest.raises(MissingCellError, match=r"no control with seed=5.*attack\.dlg\.steps=2.*defense=none seed=5"):
        _table(tmp_path)


def test_the_command_for_a_control_keeps_the_attacks_settings(tmp_path: Path) -> None:
    words = ["defense=dgp", "defense.k1=0.1", "attack=[dlg,ig]", "attack.dlg.steps=2", "attack.ig.steps=3"]
    make_run(tmp_path, "rb", defense="dgp", overrides=words)
    with pytest.raises(MissingCellError) as error:
        _table(tmp_path)
    assert str(error.value).endswith("gia-bench attack.dlg.steps=2 defense=none 'attack=[dlg]'")


def test_a_control_under_another_attack_is_none(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=("dlg",))
    make_run(tmp_path, "rb", defense="dgp", attacks=("ig",))
    with pytest.raises(MissingCellError, match=r"attack=ig has no control.*'attack=\[ig\]'$"):
        _table(tmp_path)


def test_one_command_makes_the_control_of_all_attacks_that_have_none(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=("ig",))
    make_run(tmp_path, "rb", defense="dgp", attacks=("dlg", "gia", "ig"))
    with pytest.raises(MissingCellError, match=r"attack=dlg has no control.*defense=none 'attack=\[dlg,gia\]'$"):
        _table(tmp_path)


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("model.hidden", {"model": {"hidden": 64}}),
        ("dataset.size", {"dataset": {"size": 16}}),
        ("fl.rounds", {"fl": {"rounds": 5}}),
        ("attack.dlg.steps", {"attack": {"dlg": {"steps": 300}}}),
    ],
)
def test_a_control_differs_in_nothing_but_the_defense(tmp_path: Path, key: str, config: dict[str, Any]) -> None:
    make_run(tmp_path, "ra")
    make_run(tmp_path, "rb", defense="dgp", config=config)
    with pytest.raises(ConfigError, match=rf"attack=dlg and its control differ in {key} and cannot be compared"):
        _table(tmp_path)


def test_of_several_experiments_one_is_to_be_chosen(tmp_path: Path) -> None:
    make_run(tmp_path / "one", "ra")
    make_run(tmp_path / "other", "rb", defense="dgp", config={"fl": {"rounds": 5}})
    other = re.escape(str(tmp_path / "other" / "made"))
    with pytest.raises(ConfigError, match=rf"they are of 2 experiments; take one with 'runs=\[{other}\]'"):
        _table(tmp_path)


def test_a_control_may_differ_in_the_defense_in_other_attacks_and_in_where_its_files_lie(tmp_path: Path) -> None:
    here, there = ({"paths": {"data": d}, "dataset": {"root": d, "download": d == "/a"}} for d in ("/a", "/b"))
    make_run(tmp_path, "ra", attacks=("dlg", "ig"), settings={"_target_": "none"}, config=here)
    make_run(tmp_path, "rb", defense="dgp", settings={"_target_": "dgp", "k1": 0.1}, config=there)
    assert len(_table(tmp_path).rows) == 3


def test_every_model_has_a_control_of_its_own(tmp_path: Path) -> None:
    for defense in ("none", "dgp"):
        for hidden in (32, 64):
            make_run(tmp_path, f"{defense}{hidden}", defense=defense, config={"model": {"hidden": hidden}})
    assert len(_table(tmp_path, rows=("model.hidden", "defense", "attack")).rows) == 4


def test_the_command_for_a_control_drops_the_stages_of_a_chain(tmp_path: Path) -> None:
    words = [
        "attack=[dlg]", "+attack.dlg.priors.tv=1", "defense=chain", "~defense@defense.stages.second",
        "defense@defense.stages.first=top_k", "fl.rounds=5",
    ]  # fmt: skip
    make_run(tmp_path, "rb", defense="chain", overrides=words)
    with pytest.raises(MissingCellError) as error:
        _table(tmp_path)
    kept = "+attack.dlg.priors.tv=1 fl.rounds=5"
    assert str(error.value).endswith(f"Run: gia-bench {kept} defense=none 'attack=[dlg]'")


def test_a_table_may_do_without_a_control(tmp_path: Path) -> None:
    make_run(tmp_path, "rb", defense="dgp")
    assert _lines(_table(tmp_path, control=None)) == ["| dgp | dlg | 8.0 [7.0, 9.0] n=3 |"]


def test_a_missing_cell_names_its_run_and_the_command(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "ra", leave_out=("test_accuracy",), overrides=["seed=0"])
    column = Column(metric="test_accuracy", title="acc")
    with pytest.raises(MissingCellError) as done:
        _table(tmp_path, column)
    assert "defense=none, attack=dlg has no test_accuracy. Its run ra is done." in str(done.value)
    assert str(done.value).endswith("gia-bench seed=0 force=true")
    write_status(folder, "failed", "killed")
    with pytest.raises(MissingCellError, match=r"run ra is left out \(failed\): killed\..*gia-bench seed=0$"):
        _table(tmp_path, column)


def test_runs_without_an_attack_make_no_leakage_table(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=())
    with pytest.raises(MissingCellError, match="no record has defense and attack"):
        _table(tmp_path)


def test_a_skipped_run_is_told_below_the_table(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    write_status(tmp_path / "made" / "rx", "skipped", "adgp needs a leader")
    assert "run rx is left out (skipped): adgp needs a leader" in to_markdown(_table(tmp_path))


@pytest.mark.parametrize("state", ["running", "failed"])
def test_half_a_run_is_told_below_the_table_and_never_averaged(tmp_path: Path, state: Any) -> None:
    make_run(tmp_path, "ra")
    whole = to_markdown(_table(tmp_path))
    half = make_run(tmp_path, "rb", seed=1, rounds=(0,), leave_out=("ssim",))
    write_status(half, state, "killed in round 0")
    text = to_markdown(_table(tmp_path))
    assert f"run rb is left out ({state}): killed in round 0" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == [line for line in whole.splitlines() if line.startswith("|")]


def test_runs_of_different_settings_are_never_averaged(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    make_run(tmp_path, "rb", defense="dgp", settings={"k1": 0.05, "k2": 0.75})
    make_run(tmp_path, "rc", defense="dgp", settings={"k1": 0.1, "k2": 0.75})
    with pytest.raises(ConfigError) as error:
        _table(tmp_path)
    assert "would pool 2 runs that differ in defense.k1" in str(error.value)
    assert "'table.rows=[defense,attack,defense.k1]'" in str(error.value)
    assert _lines(_table(tmp_path, rows=("defense", "attack", "defense.k1"))) == [
        "| none | dlg | – | 18.0 [17.0, 19.0] n=3 |",
        "| dgp | dlg | 0.05 | 8.0 [7.0, 9.0] n=3 |",
        "| dgp | dlg | 0.1 | 8.0 [7.0, 9.0] n=3 |",
    ]


@pytest.mark.parametrize("filters", [{"defense.k1": [0.1]}, {"defense": {"k1": 0.1}}])
def test_filters_choose_by_setting(tmp_path: Path, filters: dict[str, Any]) -> None:
    make_run(tmp_path, "rb", defense="dgp", settings={"k1": 0.05})
    make_run(tmp_path, "rc", defense="dgp", settings={"k1": 0.1})
    assert len(_table(tmp_path, filters=filters, control=None).rows) == 1


def test_filters_choose_by_record_and_keep_what_they_do_not_apply_to(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=("dlg", "ig"))
    table = _table(tmp_path, Column(metric="test_accuracy", title="acc", round="last"), filters={"attack": "ig"})
    assert _lines(table) == ["| none | ig | 0.90 |"]


def test_the_same_condition_twice_is_refused_not_counted_twice(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=("dlg",))
    make_run(tmp_path, "rb", attacks=("dlg", "ig"))
    with pytest.raises(ConfigError, match="would count seed 0 twice, in the runs ra, rb"):
        _table(tmp_path)


def test_csv_holds_the_numbers_in_full(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    rows = list(csv.DictReader(io.StringIO(to_csv(_table(tmp_path)))))
    assert rows == [
        {
            "defense": "none", "attack": "dlg", "PSNR dB": "18.0", "PSNR dB_low": "17.0", "PSNR dB_high": "19.0",
            "PSNR dB_n": "3", "PSNR dB_failed": "0", "PSNR dB_unavailable": "0", "PSNR dB_reason": "",
        }
    ]  # fmt: skip


def test_the_terminal_shows_every_number_and_the_brackets_of_the_interval(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    stream = io.StringIO()
    Console(file=stream, width=100).print(to_rich(_table(tmp_path)))
    for word in ("none", "dlg", "18.0", "[17.0, 19.0]", "n=3", "[low, high]"):
        assert word in stream.getvalue()


@pytest.mark.parametrize("width", [20, 80])
def test_the_terminal_never_cuts_a_number_however_many_columns(tmp_path: Path, width: int) -> None:
    settings = {"threshold_of_everything": 0.123456789, "error_feedback": {"enabled": True}}
    make_run(tmp_path, "ra", defense="dgp", settings=settings)
    rows = ("dataset", "model", "fl", "threat", "defense", "defense.threshold_of_everything", "attack", "seed")
    columns = [Column(metric="psnr_db", title=f"PSNR {i}", digits=4, interval=True) for i in range(8)]
    view = to_rich(_table(tmp_path, *columns, rows=rows, control=None))
    stream = io.StringIO()
    wide_enough(Console(file=stream, width=width), view).print(view)
    printed = stream.getvalue()
    assert "…" not in printed
    assert printed.count("[7.0000, 9.0000]") == printed.count("8.0000") == 8
    for word in (*rows, "curious_server", "0.123456789"):
        assert word in printed


def test_a_table_that_fits_leaves_the_width_alone(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    assert wide_enough(Console(file=io.StringIO(), width=100), to_rich(_table(tmp_path))).width == 100


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (12_345_678, "12.3 MB"), (5e9, "5.0 GB")],
)
def test_bytes_are_readable(tmp_path: Path, value: float, text: str) -> None:
    folder = make_run(tmp_path, "ra", leave_out=("uplink_bytes",))
    store = RecordStore(folder / "records.jsonl")
    who = {"run_id": "ra", "experiment": "made", "seed": 0, "dataset": "digits", "model": "lenet", "fl": "fedsgd"}
    store.append([Record.of("uplink_bytes", value, **who, threat=None, defense="none", round=0)])  # type: ignore[arg-type]
    store.close()
    column = Column(metric="uplink_bytes", title="up", round="all", show="bytes")
    assert _lines(_table(tmp_path, column)) == [f"| none | dlg | {text} |"]


@pytest.mark.parametrize("wrong", [{"metric": "psnr"}, {"statistic": "mode"}, {"round": "first"}, {"show": "hex"}])
def test_a_column_lists_its_choices(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Choose one of"):
        Column(**{"metric": "psnr_db", "title": "x", **wrong})


def test_unknown_keys_list_the_choices(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    for more in ({"rows": ("colour",)}, {"filters": {"defense.k9": 1}}):
        with pytest.raises(ConfigError, match=r"Choose one of.*dataset"):
            _table(tmp_path, **more)


@pytest.mark.parametrize("key", ["defense.stages.first.max_norm", "defense.stages.second._target_", "defense.dtype"])
def test_a_row_may_be_a_setting_that_only_other_choices_have(tmp_path: Path, key: str) -> None:
    """A chain's stages stand in their own files."""
    make_run(tmp_path, "ra")
    [line] = _lines(_table(tmp_path, rows=("defense", key, "attack")))
    assert line.startswith("| none |")


@pytest.mark.parametrize("key", ["defense.stages.first.variance", "defense.stages.third.max_norm", "defense.max_norms"])
def test_a_row_that_no_choice_has_is_refused(tmp_path: Path, key: str) -> None:
    make_run(tmp_path, "ra")
    with pytest.raises(ConfigError, match="is not known"):
        _table(tmp_path, rows=("defense", key, "attack"))


def test_runs_in_a_loop_and_under_vmap_are_of_one_condition(tmp_path: Path) -> None:
    for run_id, seed, kind in (("ra", 0, "loop"), ("rb", 1, "vmap")):
        make_run(tmp_path, run_id, seed=seed, config={"fl": {"executor": {"kind": kind}}})
    assert "n=6" in to_markdown(_table(tmp_path))
    make_run(tmp_path, "rc", seed=2, config={"fl": {"executor": {"kind": "vmap"}, "rounds": 9}})
    with pytest.raises(ConfigError, match=r"fl\.rounds"):
        _table(tmp_path)


def test_a_setting_that_is_null_in_every_run_is_a_key(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", settings={"own": None})
    table = _table(tmp_path, rows=("defense", "defense.own", "attack"))
    assert "| none | – | dlg |" in to_markdown(table)


def test_folders_without_records_and_runs_that_lie_twice_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no records"):
        Results.load(tmp_path)
    make_run(tmp_path / "one", "ra")
    make_run(tmp_path / "two", "ra")
    with pytest.raises(StorageError, match="would count twice"):
        Results.load(tmp_path)


@pytest.mark.parametrize(("flat", "says_nothing"), [(12.0, False), (17.9, False), (18.0, True), (20.0, True)])
def test_a_failed_control_marks_the_leak_under_a_defense_as_saying_nothing(
    tmp_path: Path, flat: float, says_nothing: bool
) -> None:
    make_run(tmp_path, "r1", flat=flat)  # 18 dB in the median
    make_run(tmp_path, "r2", defense="dgp", flat=flat)
    ssim, accuracy = Column(metric="ssim", title="ssim"), Column(metric="test_accuracy", title="acc", round="last")
    table = _table(tmp_path, PSNR, ssim, accuracy, baseline={"psnr_db": "oracle_flat_psnr_db"})
    for _, cells in table.rows:
        doubts = {name for name, cell in cells.items() if any("failed control" in why for why in cell.reasons)}
        assert doubts == ({"PSNR dB", "ssim"} if says_nothing else set())
    text = to_markdown(table)
    assert ("without a defense dlg reaches 18.0 dB in the median" in text) == says_nothing
