"""What every benchmark needs: a device, victims that need no data, and a clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from gia_bench.data.cifar import cifar10
from gia_bench.data.source import Dataset, InMemory
from gia_bench.errors import DataError
from gia_bench.models.build import build_victim
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Observation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images(count: int, channels: int = 3, size: int = 32) -> InMemory:
    generator = stream(0, "bench")
    pixels = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return InMemory(pixels, torch.randint(10, (count,), generator=generator))


def photographs() -> Dataset | None:
    """CIFAR-10, where it is at hand: nothing is downloaded for a benchmark."""
    root = os.environ.get("GIA_BENCH_DATA") or str(Path.home() / ".cache" / "gia_bench" / "data")
    try:
        return cifar10(root=root, download=False, verify=False)
    except DataError:
        return None


def victim(
    network: Callable[..., torch.nn.Module], channels: int = 3, size: int = 32, *, init: str = "uniform_half",
    normalize: bool = False, training: bool = True,
) -> Victim:  # fmt: skip
    made = build_victim(
        network, input_shape=(channels, size, size), num_classes=10, mean=(0.5,) * channels, std=(0.25,) * channels,
        init=init, normalize=normalize, training=training,
    )  # fmt: skip
    return made.to(DEVICE)


def observed(model: Victim, inputs: Tensor, labels: Tensor) -> list[Observation]:
    """The gradients of single images, each one victim, with known labels."""
    params, buffers = ({k: v.to(DEVICE) for k, v in part.items()} for part in model.initial())
    gradient = torch.func.grad(lambda p, b: model.objective(p, buffers, b)[0])
    shown = []
    for x, y in zip(inputs.to(DEVICE).split(1), labels.to(DEVICE).split(1), strict=True):
        update = gradient(params, Batch(x, y, torch.ones(1, device=DEVICE)))
        shown.append(Observation(params=params, buffers=buffers, update=update, labels=y, num_examples=1))
    return shown


def seconds(action: Callable[[], object], repeats: int = 5, warm: bool = True) -> float:
    """The median of a few calls, with the device's work finished; warm: after one that does not count."""
    times = []
    for _ in range(repeats + warm):
        started = time.perf_counter()
        action()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[warm:])
