"""breaching 0.1.2 beside us: its own code, unchanged, on our victims (pip install 'gia-bench[bench]')."""

from __future__ import annotations

import contextlib
import io
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from gia_bench.models.functional import Victim
from gia_bench.values import Observation


def installed() -> str | None:
    """Its version, or None."""
    try:
        return version("breaching")
    except PackageNotFoundError:
        return None


@cache
def _settings(steps: int, weight: float) -> Any:
    """Composed once: that is no part of its attack."""
    import breaching

    overrides = [f"optim.max_iterations={steps}", f"regularization.total_variation.scale={weight}"]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it greets, and it was written for an older Hydra
        return breaching.get_attack_config("invertinggradients", overrides=overrides)


def reconstruct(model: Victim, observation: Observation, steps: int, weight: float, seed: int) -> Tensor:
    """Images [B, C, H, W] in [0, 1] by its "invertinggradients" with ``steps`` steps and total variation ``weight``."""
    import breaching  # only here: it takes seconds, and may not be there

    params, device = list(observation.params.values()), next(iter(observation.params.values())).device
    cfg, setup = _settings(steps, weight), {"device": device, "dtype": torch.float}
    attacker = breaching.attacks.prepare_attack(model.module, torch.nn.CrossEntropyLoss(), cfg, setup)
    C = model.input_shape[0]
    mean = torch.zeros(C) if model.mean is None else model.mean.cpu()
    std = torch.ones(C) if model.std is None else model.std.cpu()
    metadata = OmegaConf.create(
        {"shape": list(model.input_shape), "modality": "vision", "mean": mean.tolist(), "std": std.tolist()}
    )
    # public statistics mean evaluation mode to it, none training mode
    buffers = None if model.training else list(observation.buffers.values())
    payload = {"parameters": params, "buffers": buffers, "metadata": metadata}
    shared = {
        "gradients": [observation.update[k] for k in observation.params],
        "buffers": None,
        "metadata": {
            "num_data_points": observation.num_examples, "labels": observation.labels, "local_hyperparams": None,
        },
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # its first guess
        found, _ = attacker.reconstruct([payload], [shared], {}, dryrun=False)
    pixels: Tensor = found["data"].detach()
    return pixels * std.to(device).view(-1, 1, 1) + mean.to(device).view(-1, 1, 1)
