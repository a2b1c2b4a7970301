"""Which code, libraries, data and machine a run's numbers come from."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

LIBRARIES = ("gia-bench", "torch", "torchvision", "lightning", "torchmetrics", "lpips", "numpy", "scipy")


def versions(data: str) -> dict[str, Any]:
    """Library versions, the data's own version (``Dataset.version``), and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    libraries = {name: version(name) for name in LIBRARIES}
    return libraries | {"python": platform.python_version(), "data": data, "device": device}
