"""Freed memory is kept for the next tensors, unless the user chose otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from gia_bench.allocator import keep_freed_memory

FAULTS = """
import resource
import torch
from gia_bench.allocator import keep_freed_memory

assert keep_freed_memory()


def step():
    return [torch.ones(2**20) for _ in range(16)]  # 4 MiB each


for _ in range(4):  # until everything that a step needs has found its place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_the_same_pages_serve_the_next_step() -> None:
    """Without it the kernel clears all 81,920 pages of five steps, or none, by what happens to lie behind them."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    ended = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    assert int(ended.stdout) < 5 * 16 * 1024 / 100


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_a_users_own_choice_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "131072")
    assert not keep_freed_memory()
