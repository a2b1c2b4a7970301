"""Where R-GAP begins: the last layer's input and the loss's gradient at the scores, read off that layer's gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gia_bench.models.functional import Loss

LARGEST = 8.0
"""The search for the input's length ends where the loss's gradient is 10 ** -LARGEST times its largest."""
POINTS, STEPS = 200, 40
AGREES = 1e-3
"""A misfit, relative to the gradient, below which a reading is not told from the best one."""


class Beginning(NamedTuple):
    """inputs [n] of the last layer; slopes [K], the loss's gradient at the scores; label [K], one-hot (of a single
    score: 0 or 1); misfit: of the scores' gradient, relative.
    """

    inputs: Tensor
    slopes: Tensor
    label: Tensor
    misfit: float


def hypotheses(classes: int) -> Tensor:
    """The labels one example can have, [labels, classes]; of a single score both answers of a logistic regression."""
    return torch.eye(classes, dtype=torch.float64) if classes > 1 else torch.tensor([[0.0], [1.0]]).double()


def beginnings(
    weight: Tensor,
    bias: Tensor | None,
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    loss: Loss,
    labels: Tensor,
    most: int,
) -> list[Beginning]:
    """The readings that explain the last layer's gradient, the best first, at most ``most``.

    weight, weight_gradient: [K, n]; labels: [L, K], those to try. With a bias there is one: its gradient is the slopes
    themselves. Without, the gradient u v^T = slopes inputs^T leaves the length and the sign of inputs = a v open, and
    the loss decides: slopes(a W v, label) = u / a, which is the paper's equation for mu = y f(x), for any number of
    scores. For one score or two classes several readings can explain it (the equation is not monotone, and a label can
    change its sign with the input), so the layers before must tell.
    """
    if bias is not None and bias_gradient is not None:
        inputs = bias_gradient @ weight_gradient / bias_gradient.square().sum()
        made = _slopes(loss, (weight @ inputs + bias).expand(len(labels), -1), labels)
        misfits = (made - bias_gradient).norm(dim=1) / bias_gradient.norm()
        best = int(misfits.argmin())
        return [Beginning(inputs, bias_gradient, labels[best], float(misfits[best]))]
    left, sizes, right = torch.linalg.svd(weight_gradient, full_matrices=False)
    u, v = left[:, 0] * sizes[0], right[0]
    scales, tried, misfits = _lengths(loss, weight @ v, u, labels)
    found: list[Beginning] = []
    for i in misfits.argsort().tolist():
        if misfits[i] > max(AGREES, 10 * float(misfits.min())) or len(found) == most:
            break
        inputs = scales[i] * v
        if not any(torch.equal(labels[tried[i]], b.label) and torch.allclose(inputs, b.inputs) for b in found):
            found.append(Beginning(inputs, u / scales[i], labels[tried[i]], float(misfits[i])))
    return found


def _lengths(loss: Loss, scores: Tensor, u: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed lengths at which the misfit has a local minimum, the label each belongs to, and the misfits there."""
    # every slope of a score is at most 1, so the length is at least the largest entry of u
    sizes = u.abs().max() * torch.logspace(-0.1, LARGEST, POINTS, dtype=u.dtype)
    grid = torch.stack([sizes, -sizes])[None].expand(len(labels), -1, -1)
    which = torch.arange(len(labels))[:, None, None].expand_as(grid)

    def misfit(lengths: Tensor, own: Tensor) -> Tensor:
        left: Tensor = (lengths[:, None] * _slopes(loss, lengths[:, None] * scores, own) - u) / u.norm()
        return left

    coarse = misfit(grid.flatten(), labels[which.flatten()]).norm(dim=1).view(grid.shape)
    edge = coarse.new_full((*coarse.shape[:2], 1), torch.inf)
    lowest = (coarse <= torch.cat([coarse[..., 1:], edge], -1)) & (coarse <= torch.cat([edge, coarse[..., :-1]], -1))
    lengths, tried = grid[lowest], which[lowest]
    for _ in range(STEPS):  # Gauss-Newton in one unknown each
        value, change = misfit(lengths, labels[tried]), _change(loss, lengths, scores, labels[tried]) / u.norm()
        step = (value * change).sum(1) / change.square().sum(1).clamp(min=torch.finfo(u.dtype).tiny)
        lengths = lengths - torch.maximum(torch.minimum(step, 0.2 * lengths.abs()), -0.2 * lengths.abs())
    return lengths, tried, misfit(lengths, labels[tried]).norm(dim=1)


def _change(loss: Loss, lengths: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """The derivative of lengths * slopes by the lengths [N, K]; the loss's second derivatives are symmetric."""
    at = lengths[:, None] * scores
    bent: Tensor = torch.func.grad(lambda f: (_slopes(loss, f, labels) * scores).sum())(at)
    change: Tensor = _slopes(loss, at, labels) + lengths[:, None] * bent
    return change


def _slopes(loss: Loss, scores: Tensor, labels: Tensor) -> Tensor:
    """The gradient of every row's loss at its scores [N, K]."""
    made: Tensor = torch.func.grad(lambda f: loss(f, labels).sum())(scores)
    return made
