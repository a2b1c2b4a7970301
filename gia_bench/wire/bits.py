"""Bits: the integer view of numbers, and eight booleans in a byte."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from gia_bench.values import Shared

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(numbers: Tensor) -> Tensor:
    """The same memory as integers of the same width; -0.0 and every NaN differ from 0 here."""
    return numbers.detach().view(_INTEGERS[numbers.element_size()])


def packed_bits(mask: Tensor) -> Tensor:
    """Booleans of any shape as ceil(n / 8) bytes [uint8], lowest bit first; the last byte is filled up with zeros."""
    flat = mask.reshape(-1).to(torch.uint8)
    rows = pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked_bits(packed: Tensor, num_bits: int) -> Tensor:
    """The first ``num_bits`` booleans [num_bits] of ``packed_bits``' bytes."""
    rows = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (rows & 1).view(-1)[:num_bits].bool()


def shared_bytes(shared: Shared) -> int:
    """Bytes of a defense's announcement to one client: a mask costs one bit per entry, anything else its own size."""
    return sum(math.ceil(t.numel() / 8) if t.dtype == torch.bool else t.nbytes for t in shared.values())
