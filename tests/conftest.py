from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real datasets. Where CI promises them their absence is a failure, elsewhere a skip."""
    root = os.environ.get("GIA_BENCH_DATA")
    if root and Path(root).is_dir():
        return Path(root)
    if os.environ.get("CI") == "true":
        pytest.fail("CI=true, but GIA_BENCH_DATA does not name a folder with the real datasets.")
    pytest.skip("GIA_BENCH_DATA does not name a folder with the real datasets")
