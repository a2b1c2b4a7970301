"""What the README shows is true."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command import SMALL, run

from gia_bench.conf_path import CONF

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def block(containing: str) -> str:
    [found] = [text for _, text in BLOCKS if containing in text]
    return str(found)


def test_the_python_example_runs_and_rebuilds_the_image(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block("dlg(steps=20)"))
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    psnr_db, labels = map(float, done.stdout.split())
    assert psnr_db > 30
    assert labels == 1


def test_the_pandas_example_reads_a_run(tmp_path: Path) -> None:
    assert run("gia-bench", *SMALL, "logger=none", f"paths.outputs={tmp_path}").status == 0
    [records] = tmp_path.rglob("records.jsonl")
    code = block("pandas.read_json").replace("outputs/demo/<run_id>/records.jsonl", str(records)).splitlines()
    code[-1] = f"print({code[-1]})"
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True)
    assert "inverting_gradients_fast" in done.stdout


@pytest.mark.parametrize(
    "group", ["attack", "defense", "model", "dataset", "fl", "threat", "partition", "pruning", "aggregation"]
)
def test_every_choice_has_its_place_in_the_readme(group: str) -> None:
    choices = [path.stem for path in (CONF / group).glob("*.yaml")]
    assert choices
    for choice in choices:
        assert f"`{choice}`" in README, f"{group}={choice}"


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_an_installed_wheel_finds_its_configuration(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {f"gia_bench/conf/{p.relative_to(CONF).as_posix()}" for p in CONF.rglob("*.yaml")} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "outputs", "conf/"))]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from gia_bench.conf_path import CONF; print(CONF)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "site" / "gia_bench" / "conf"
