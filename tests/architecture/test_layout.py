"""The design's borders, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gia_bench"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names a file imports; ``from a import b`` gives a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path.name}: a relative import hides what it reaches"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith("gia_bench.")}


def inside(folder: str) -> list[Path]:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("path", inside("attacks"), ids=lambda p: p.name)
def test_attacks_import_nothing_private(path: Path) -> None:
    allowed = ("values", "rows", "errors", "seeding", "models", "attacks")
    flags = {"gia_bench.threat.Knowledge", "gia_bench.threat.Power"}
    for name in ours(path) - flags:
        assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("folder", ["defenses", "wire", "models"])
def test_client_side_parts_know_nothing_of_attacks_or_measurement(folder: str) -> None:
    for path in inside(folder):
        for name in ours(path):
            assert name.split(".")[1] not in ("attacks", "metrics", "probes", "records", "report", "data"), name


def test_only_the_valve_the_metrics_and_the_probe_touch_the_truth() -> None:
    readers = {p.relative_to(PACKAGE).as_posix() for p in FILES if "gia_bench.values.Truth" in imports(p)}
    assert readers == {
        "__init__.py", "data/cohort.py", "threat.py", "metrics/evaluate.py", "probes/leakage.py", "records/images.py",
    }  # fmt: skip


def test_configuration_stops_at_its_edge() -> None:
    readers = {p.relative_to(PACKAGE).as_posix() for p in FILES if any("DictConfig" in n for n in imports(p))}
    assert readers <= {"config.py", "app.py", "report/app.py", "generators/app.py"}, readers


def test_files_are_short_and_named_for_what_they_do() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 300, path
        assert path.stem not in ("utils", "core", "common", "helpers", "manager", "misc")


def test_randomness_comes_from_named_streams() -> None:
    for path in FILES:
        text = path.read_text()
        if path.name != "seeding.py":
            assert "manual_seed(" not in text and "seed_everything" not in text, path


def test_checkpoints_are_read_as_weights_only() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
