"""How much the pixels of an image tell about those of the truth."""

from __future__ import annotations

import torch
from torch import Tensor

NMI_BINS = 256


def nmi(images: Tensor, truth: Tensor, bins: int = NMI_BINS) -> Tensor:
    """Normalised mutual information ``2 I(A;B) / (H(A) + H(B))`` in [0, 1] for every image of [n, C, H, W] in [0, 1].

    I and H are those of the joint histogram of pixel values, ``bins`` equal bins over [0, 1], all channels together.
    PriPrune uses an NMI without a definition; bins and the arithmetic mean are a gia_bench choice. Two constant images
    score 1, as in scikit-learn. A small image fills few bins and so scores high by chance: compare equal sizes only.
    """
    pairs = zip(_levels(images, bins), _levels(truth, bins), strict=True)
    scores = [_nmi(a, b, bins) for a, b in pairs]
    return torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64)


def _levels(images: Tensor, bins: int) -> Tensor:
    return (images.double() * bins).floor().long().clamp(0, bins - 1).flatten(1)


def _nmi(a: Tensor, b: Tensor, bins: int) -> Tensor:
    of_a, of_b, of_both = _entropy(a), _entropy(b), _entropy(a * bins + b)
    if of_a + of_b == 0:
        return torch.ones((), dtype=torch.float64)
    return (2 * (of_a + of_b - of_both) / (of_a + of_b)).clamp(0, 1)


def _entropy(levels: Tensor) -> Tensor:
    """In nats, of how often each level occurs."""
    counts: Tensor = torch.bincount(levels)
    share = counts[counts > 0].double() / levels.numel()
    return -(share * share.log()).sum()
