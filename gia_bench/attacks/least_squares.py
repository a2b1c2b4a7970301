"""Least squares for tall dense systems, which says when the solution is not the only one."""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(matrix: Tensor, values: Tensor, precision: float) -> Tensor:
    """The x that leaves the least of matrix @ x = values; of several the shortest. All float64 on the CPU.

    precision: below this share of the largest, what a column adds to those before it counts as nothing. One unpivoted
    QR factorisation where all columns count, which is several times cheaper than one that finds ranks.
    """
    rows, columns = matrix.shape
    if rows >= columns:
        triangle = torch.linalg.qr(torch.cat([matrix, values[:, None]], 1), mode="r").R
        matrix, values = triangle[:columns, :columns], triangle[:columns, columns]
        sizes = matrix.diagonal().abs()
        if sizes.min() > precision * sizes.max():
            only: Tensor = torch.linalg.solve_triangular(matrix, values[:, None], upper=True)[:, 0]
            return only
    # gelsy: rank-revealing, and the shortest solution of those that fit
    shortest: Tensor = torch.linalg.lstsq(matrix, values[:, None], rcond=precision, driver="gelsy").solution[:, 0]
    return shortest


def numerical_rank(matrix: Tensor, precision: float) -> int:
    """The number of singular values above ``precision`` times the largest."""
    sizes = torch.linalg.svdvals(torch.linalg.qr(matrix, mode="r").R if len(matrix) > matrix.shape[1] else matrix)
    return int((sizes > precision * sizes.max()).sum())
