from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from made_runs import make_run
from matplotlib.figure import Figure
from matplotlib.image import imread
from omegaconf import OmegaConf

from gia_bench.conf_path import CONF
from gia_bench.errors import ConfigError
from gia_bench.records.runs import write_status
from gia_bench.report import app
from gia_bench.report.figures import PrivacyUtility, ReconstructionGrid
from gia_bench.report.results import MissingCellError, Results
from gia_bench.report.tables import Column, TableSpec


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    make_run(tmp_path, "ra", attacks=("dlg", "ig"), rounds=(0, 9), images=True)
    make_run(tmp_path, "rb", defense="dgp", attacks=("dlg", "ig"), rounds=(0, 9), images=True)
    return tmp_path


def _labels(figure: Figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]


def test_the_grid_shows_the_private_images_once_and_below_them_every_reconstruction(two_runs: Path) -> None:
    figure = ReconstructionGrid().draw(Results.load(two_runs))
    assert _labels(figure) == ["private", "none\ndlg", "none\nig", "dgp\ndlg", "dgp\nig"]
    assert [part.get_suptitle() for part in figure.subfigs] == ["round 0, client 3", "round 9, client 3"]
    assert len(figure.axes) == 2 * 5 * 3
    captions = [axes.get_xlabel() for axes in figure.axes]
    assert captions[:3] == ["", "", ""]
    assert all(caption.endswith(" dB") for caption in captions[3:15])


def test_the_grid_shows_no_more_than_it_is_asked_for(two_runs: Path) -> None:
    grid = ReconstructionGrid(victims=2, rounds=[9], filters={"attack": "ig", "defense": "dgp"})
    figure = grid.draw(Results.load(two_runs))
    assert _labels(figure) == ["private", "dgp\nig"]
    assert [part.get_suptitle() for part in figure.subfigs] == ["round 9, client 3"]
    assert len(figure.axes) == 4


def test_settings_tell_runs_of_one_defense_apart(tmp_path: Path) -> None:
    for run_id, k1 in (("ra", 0.05), ("rb", 0.1)):
        make_run(tmp_path, run_id, defense="dgp", settings={"k1": k1}, images=True)
    figure = ReconstructionGrid().draw(Results.load(tmp_path))
    assert _labels(figure)[1:] == ["dgp k1=0.05\ndlg", "dgp k1=0.1\ndlg"]


def test_a_grid_without_images_names_the_command(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    with pytest.raises(MissingCellError, match="gia-bench images=true"):
        ReconstructionGrid().draw(Results.load(tmp_path))


def test_gray_images_keep_their_contrast(two_runs: Path) -> None:
    figure = ReconstructionGrid().draw(Results.load(two_runs))
    assert {axes.images[0].get_clim() for axes in figure.axes} == {(0.0, 1.0)}


def test_a_point_is_the_strongest_attack_and_the_last_accuracy(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=("dlg", "ig"))
    make_run(tmp_path, "rb", defense="dgp", attacks=("dlg", "ig"))
    points = PrivacyUtility().points(Results.load(tmp_path))
    assert set(points) == {"none", "dgp"}
    assert points["none"] == pytest.approx((18.0, 0.9))
    assert points["dgp"] == pytest.approx((8.0, 0.85))
    figure = PrivacyUtility().draw(Results.load(tmp_path))
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"Pareto front", "1  dgp", "2  none"}
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2"]
    assert "lower is more private" in figure.axes[0].get_xlabel()


def test_a_front_of_one_point_shows_and_equal_accuracies_stay_on_one_height(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    axes = PrivacyUtility().draw(Results.load(tmp_path)).axes[0]
    low, high = axes.get_ylim()
    assert high - low >= 0.05
    assert axes.lines[0].get_marker() == "o"


def test_a_point_is_compared_with_undefended_runs_of_the_same_experiment_only(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    make_run(tmp_path, "rb", defense="dgp", config={"model": {"hidden": 64}})
    with pytest.raises(ConfigError, match=r"privacy_utility: dgp and its control differ in model\.hidden and") as error:
        PrivacyUtility().draw(Results.load(tmp_path))
    assert "+figure.privacy_utility.filters.model.hidden=" in str(error.value)
    assert set(PrivacyUtility().points(Results.load(tmp_path).where({"defense": "dgp"}))) == {"dgp"}


def test_a_point_needs_the_seeds_and_attacks_of_the_undefended_runs(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", attacks=("dlg", "ig"))
    make_run(tmp_path, "rb", defense="dgp")
    with pytest.raises(ConfigError, match=r"differ in attack\.ig\.steps and"):
        PrivacyUtility().draw(Results.load(tmp_path))
    of_dlg = PrivacyUtility(filters={"attack": "dlg"})
    assert set(of_dlg.points(Results.load(tmp_path).where(of_dlg.filters))) == {"none", "dgp"}
    make_run(tmp_path, "rc", defense="dgp", seed=5, overrides=["seed=5", "defense=dgp"])
    with pytest.raises(
        MissingCellError, match=r"dgp has no control with seed=5\. Run: gia-bench.* defense=none seed=5$"
    ):
        of_dlg.draw(Results.load(tmp_path))


def test_defenses_without_any_undefended_run_are_drawn_as_they_are(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", defense="dgp")
    make_run(tmp_path, "rb", defense="top_k", seed=1)
    assert set(PrivacyUtility().points(Results.load(tmp_path))) == {"dgp", "top_k"}


def test_a_defense_without_accuracy_names_the_command(tmp_path: Path) -> None:
    make_run(tmp_path, "ra", leave_out=("test_accuracy",), overrides=["seed=0"])
    with pytest.raises(
        MissingCellError, match=r"none has no value of test_accuracy\. Run: gia-bench seed=0 force=true"
    ):
        PrivacyUtility().draw(Results.load(tmp_path))


def test_half_a_run_is_no_point(tmp_path: Path) -> None:
    make_run(tmp_path, "ra")
    write_status(make_run(tmp_path, "rb", defense="dgp", leave_out=("test_accuracy",)), "failed", "NaN in round 8")
    figure = PrivacyUtility().draw(Results.load(tmp_path))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1"]


def test_a_part_that_some_runs_lack_is_named_as_a_whole(tmp_path: Path) -> None:
    make_run(
        tmp_path, "ra", defense="graddefense", settings={"q": 1, "compensation": {"variance": "exact", "pad": True}}
    )
    make_run(tmp_path, "rb", defense="graddefense", settings={"q": 1, "compensation": None})
    make_run(tmp_path, "rc", defense="dgp", settings={"error_feedback": {"enabled": True}})
    make_run(tmp_path, "rd", defense="dgp", settings={"error_feedback": {"enabled": False}})
    assert set(Results.load(tmp_path).labels.values()) == {
        "graddefense compensation", "graddefense no compensation",
        "dgp error_feedback.enabled=True", "dgp error_feedback.enabled=False",
    }  # fmt: skip


def test_a_label_names_the_choice_that_differs_and_settings_only_within_one_choice(tmp_path: Path) -> None:
    small, wide, trained = ({"model": {"width": w, "checkpoint": c}} for w, c in ((4, None), (8, None), (8, "a.pt")))
    make_run(tmp_path, "ra", config=small, model="mlp")
    make_run(tmp_path, "rb", config=wide)
    make_run(tmp_path, "rc", config=trained)
    make_run(tmp_path, "rd", config=wide, defense="dgp")
    assert Results.load(tmp_path).labels == {
        "ra": "none model=mlp", "rb": "none model=lenet model.checkpoint=None",
        "rc": "none model=lenet model.checkpoint=a.pt", "rd": "dgp",
    }  # fmt: skip


def test_figures_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(ConfigError, match="must be 1 or more"):
        ReconstructionGrid(victims=0)
    with pytest.raises(ConfigError, match="Choose one of"):
        PrivacyUtility(metric="test_accuracy")


def test_a_picture_that_cannot_be_drawn_takes_no_table_away(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "ra", leave_out=("test_accuracy",))
    spec = TableSpec(name="leak", title="x", rows=("defense",), columns={"psnr": Column(metric="psnr_db", title="x")})
    with pytest.raises(MissingCellError, match="test_accuracy"):
        app.report([tmp_path / "runs"], spec, [PrivacyUtility()], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["leak.csv", "leak.md"]


def test_the_command_prints_the_table_and_writes_all_files(
    two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gia-bench-report", f"paths.outputs={two_runs}", f"output={output}"])
    monkeypatch.setenv("COLUMNS", "120")
    app.main()
    printed = capsys.readouterr().out
    for word in ("none", "dgp", "[17.0, 19.0]", "90.0 %", "(10.0x less)", "images are too small", "leakage.csv"):
        assert word in printed
    assert sorted(path.name for path in output.iterdir()) == [
        "leakage.csv", "leakage.md", "privacy_utility.png", "reconstructions.png",
    ]  # fmt: skip
    picture = imread(io.BytesIO((output / "reconstructions.png").read_bytes()), format="png")
    assert np.ptp(picture) > 0.5


def test_the_command_ends_with_a_sentence_and_not_with_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "rb", defense="dgp")
    monkeypatch.setattr(sys, "argv", ["gia-bench-report", f"paths.outputs={tmp_path}"])
    with pytest.raises(SystemExit) as exit_:
        app.main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "has no control with defense=none" in error
    assert "defense=none" in error.splitlines()[-1]


def test_no_table_and_no_figure_write_nothing_for_it(
    two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["gia-bench-report", f"paths.outputs={two_runs}", f"output={output}", "table=null"]
    monkeypatch.setattr(sys, "argv", [*words, "figure=[privacy_utility]"])
    app.main()
    assert [path.name for path in output.iterdir()] == ["privacy_utility.png"]
    assert "none" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "figure=[]"])
    app.main()
    assert capsys.readouterr().out == ""


def test_help_lists_what_this_command_reads_and_no_group_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gia-bench-report", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        app.main()
    lines = capsys.readouterr().out.splitlines()
    for group in ("table", "figure"):
        known = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        assert any(line.startswith(group) and line.endswith(known) for line in lines)
    assert not any(line.startswith(("attack", "defense:", "model", "trainer")) for line in lines)


CONFIGS = [path for group in ("table", "figure", "metrics") for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_spells_all_fields_of_what_it_makes(path: Path) -> None:
    own = OmegaConf.load(path)
    for parent in own.pop("defaults", []):
        own = OmegaConf.merge(OmegaConf.load(path.with_name(f"{parent}.yaml")), own)
    config = OmegaConf.create({"paths": {"data": "/data"}, "part": own})
    made = instantiate(config.part, _convert_="all")
    assert {field.name for field in dataclasses.fields(made)} == set(config.part) - {"_target_"}


def test_there_are_configs_of_every_kind() -> None:
    assert {path.parent.name for path in CONFIGS} == {"table", "figure", "metrics"}
