"""How the weights of a victim start. Each rule draws from torch's global generator, seeded by the caller."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Initialisation = Callable[[nn.Module], None]
"""Fills a module's parameters in place."""


def keep(module: nn.Module) -> None:
    """What the layers' constructors drew: torch's own defaults."""


@torch.no_grad()
def uniform_half(module: nn.Module) -> None:
    """Every ``weight`` and ``bias`` of every layer from U(-0.5, 0.5), BatchNorm's too (code of DLG and iDLG).

    Parameters of other names (a transformer's class token) keep their defaults, as in that code.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name in ("weight", "bias"):
                parameter.uniform_(-0.5, 0.5)


@torch.no_grad()
def kaiming_normal(module: nn.Module) -> None:
    """Weights of convolutions and linear layers from N(0, 2 / fan_in) (He et al., ICCV 2015); the rest by default."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight)


INITIALISATIONS: dict[str, Initialisation] = {
    "default": keep,
    "uniform_half": uniform_half,
    "kaiming_normal": kaiming_normal,
}
