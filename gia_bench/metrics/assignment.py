"""Which reconstruction belongs to which private image: decided once, used by every metric and every picture."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gia_bench.errors import ConfigError

NO_MATCH = -1


def match(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """For every truth image the index of its reconstruction, or -1: [n] int64.

    reconstruction: [m, C, H, W], truth: [n, C, H, W], both in [0, 1]. The one-to-one assignment of least total squared
    error (Hungarian method); min(m, n) images get a partner, and one with a NaN or infinite pixel never does. Flat
    reconstructions (every channel one number: what attacks give for an image that they did not find) are left for the
    images that no other one was matched to: near a dark image, a black one would take it from its own. The result
    indexes the reconstruction: ``reconstruction[match(reconstruction, truth)]`` lies in the order of the truth.
    Raises ``ConfigError`` where the two hold images of different shapes.
    """
    if reconstruction.shape[1:] != truth.shape[1:]:
        raise ConfigError(
            f"match: reconstructions are {tuple(reconstruction.shape[1:])} but the private images "
            f"{tuple(truth.shape[1:])} (channels, height, width): give images of the same shape."
        )
    partner = torch.full((len(truth),), NO_MATCH, dtype=torch.int64)
    usable = reconstruction.flatten(1).isfinite().all(1).nonzero().flatten().cpu()
    # sums over pixels order the pairs as means do
    candidates = reconstruction.detach().cpu()[usable].flatten(2).double()
    flat = (candidates == candidates[..., :1]).flatten(1).all(1)
    private = truth.detach().cpu().flatten(1).double()
    for rows in ((~flat).nonzero().flatten(), flat.nonzero().flatten()):
        left = (partner == NO_MATCH).nonzero().flatten()
        cost = torch.cdist(private[left], candidates[rows].flatten(1)).square()
        images, chosen = linear_sum_assignment(cost.numpy())
        partner[left[torch.as_tensor(images)]] = usable[rows[torch.as_tensor(chosen)]]
    return partner
