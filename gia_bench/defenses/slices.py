"""A model's coordinates cut into runs of equal leakage risk, and a few of them drawn by chance (GradDefense).

Coordinates are counted through the tensors in the model's order. An atom is as many of them as divide every tensor's
size (their greatest common divisor), so that no atom lies in two tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gia_bench.rows import cut, joined
from gia_bench.values import Params, Update


def atom_size(sizes: Sequence[int]) -> int:
    """Coordinates in an atom, for tensors of these sizes."""
    return math.gcd(*sizes)


def equal_risk(sizes: Sequence[int], risk: Tensor, count: int) -> Tensor:
    """The borders [count + 1] int64 of ``count`` slices: slice j holds the coordinates borders[j]..borders[j + 1] - 1.

    risk: [tensors], at least 0 and finite; spread evenly over a tensor's atoms. Slice j ends with the atom at which the
    risk so far reaches j + 1 shares of 1 / count (Wang et al. 2022, GradDefense), so that a slice's risk is one share
    up to one atom's. gia_bench choices: the risk is counted from the first atom on, so that what one slice takes too
    much is not missing in the last alone (the released code starts at 0 in every slice); a slice has at least one atom,
    also where a single one holds more than a share; where there is no risk at all, slices are of equal size.

    The released code differs in two more ways: its borders lie one coordinate low, and both ends of a slice are inside,
    so that a coordinate between two slices can get noise twice.
    """
    size = atom_size(sizes)
    atoms = torch.tensor(sizes, dtype=torch.float64) / size
    total_atoms = sum(sizes) // size
    risk = risk.detach().to("cpu", torch.float64)
    if not bool(risk.any()):
        risk = atoms
    reached = risk.cumsum(0)
    wanted = reached[-1] * torch.arange(1, count, dtype=torch.float64) / count
    tensor = torch.searchsorted(reached, wanted).clamp(max=len(sizes) - 1)
    missing = (wanted - (reached - risk)[tensor]) / risk[tensor] * atoms[tensor]
    # an atom that the rounding of the quotient alone would add is not added
    inside = torch.minimum((missing - 1e-9).ceil().clamp(min=0), atoms[tensor])
    ends = ((atoms.cumsum(0) - atoms)[tensor] + inside).long()
    order = torch.arange(1, count)
    ends = (ends - order).clamp(min=0).cummax(0).values + order if count > 1 else ends
    ends = torch.minimum(ends, total_atoms - count + order)
    return size * torch.cat([torch.tensor([0]), ends, torch.tensor([total_atoms])])


def reservoir(count: int, chosen: int, generator: torch.Generator) -> Tensor:
    """True for ``chosen`` of ``count`` slices [count], each set equally likely: Vitter's Algorithm R, one pass."""
    kept = list(range(chosen))
    for i in range(chosen, count):
        place = int(torch.randint(i + 1, (), generator=generator))
        if place < chosen:
            kept[place] = i
    mask = torch.zeros(count, dtype=torch.bool)
    mask[kept] = True
    return mask


def spread(values: Tensor, borders: Tensor, like: Params) -> dict[str, Tensor]:
    """One value per slice [count] -> each coordinate's, in the shapes of ``like`` (in the model's order)."""
    num_coordinates = sum(p.numel() for p in like.values())
    slices = torch.arange(len(borders) - 1, device=borders.device)
    own = torch.repeat_interleave(slices, borders.diff(), output_size=num_coordinates)
    return cut(values[own], like)


def energies(update: Update, borders: Tensor, like: Params) -> Tensor:
    """The sum of squares in each slice [count] float64."""
    # a running sum: scattered adds would come in any order on a GPU
    row = joined(update, like).double().square().cumsum(0)
    return torch.cat([row.new_zeros(1), row])[borders].diff().clamp(min=0)
