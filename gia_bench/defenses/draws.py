"""Random numbers for every entry of an update in one call, since a call per tensor takes longer than its numbers."""

from __future__ import annotations

import torch

from gia_bench.rows import cut
from gia_bench.values import Noise, Params


def normal(like: Params, generator: torch.Generator) -> Noise:
    """Standard normal numbers, float32 on the CPU, by parameter name; other ones than of a call for each tensor."""
    return cut(torch.randn(_size(like), generator=generator), like)


def uniform(like: Params, generator: torch.Generator) -> Noise:
    """Numbers in [0, 1), float32 on the CPU, by parameter name; the same as of a call for each tensor."""
    return cut(torch.rand(_size(like), generator=generator), like)


def laplace(like: Params, generator: torch.Generator) -> Noise:
    """Laplace(0, 1) numbers, float32 on the CPU, by parameter name."""
    # half of the uniform numbers for each sign; what is left is below 1, so that the logarithm is finite
    twice = torch.rand(_size(like), generator=generator).mul_(2)
    return cut(twice.frac().neg_().log1p_().copysign_(twice - 1), like)


def _size(like: Params) -> int:
    return sum(p.numel() for p in like.values())
