"""How ATS finds its policy: two scores of a sub-policy without any training, and a ranking (Gao et al., CVPR 2021)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.func import grad, vmap

from gia_bench.defenses.ats import ATS, TABLE
from gia_bench.defenses.checks import check
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Buffers, Params

LENGTH = 3
"""Operations drawn for a sub-policy."""
POINTS = 21
"""Places on the line from noise to an image."""
FLOOR = 1e-5
"""Added to an eigenvalue before its logarithm and its inverse."""


@final
@dataclass(frozen=True, kw_only=True)
class Scored:
    """A sub-policy with its scores. privacy: mean over the images, in [-1, 1], lower is better; variance: of the same
    over the images; accuracy: mean over the runs, higher is better, at most minus the number of images."""

    policy: str
    privacy: float
    variance: float
    accuracy: float


def random_schemes(count: int, generator: torch.Generator) -> list[str]:
    """Sub-policies of at most three ids, drawn uniformly from -1..49; -1 stands for none and is left out.

    The reference draws up to 50, which has no operation, and may draw nothing at all; here neither is kept.
    """
    schemes: list[str] = []
    while len(schemes) < count:
        drawn = torch.randint(-1, len(TABLE), (LENGTH,), generator=generator).tolist()
        kept = [str(i) for i in drawn if i >= 0]
        if kept:
            schemes.append("-".join(kept))
    return schemes


def transformed(ats: ATS, images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, C, H, W] as a client would use them once."""
    count = len(images)
    batch = Batch(images[None], torch.zeros(1, count, dtype=torch.int64), torch.ones(1, count))
    noise = {k: v.to(images.device) for k, v in ats.draw({}, batch, generator).items()}
    return ats.transform(batch, noise).inputs[0]


def privacy_scores(
    victim: Victim, params: Params, buffers: Buffers, images: Tensor, labels: Tensor, noise: Tensor
) -> Tensor:
    """How early the gradient of a blurred image looks like the image's own: [N], in [-1, 1], lower is better.

    images: [N, C, H, W], transformed; labels [N]; noise: like the images, uniform in [0, 1]. At 21 points of the line
    from the noise to the image, the cosine similarity of the two gradients, mean over the parameter tensors; its area
    by trapezoids over the line's length. In evaluation mode. params: of a model trained a little.
    """
    fixed = dataclasses.replace(victim, training=False)

    def gradient(image: Tensor, label: Tensor) -> Params:
        batch = Batch(image[None], label[None], image.new_ones(1))
        result: Params = grad(lambda weights: fixed.objective(weights, buffers, batch)[0])(params)
        return result

    def of_one(image: Tensor, label: Tensor, start: Tensor) -> Tensor:
        own = gradient(image, label)

        def similarity(place: Tensor) -> Tensor:
            here = gradient(place * image + (1 - place) * start, label)
            cosines = [torch.cosine_similarity(here[k].flatten(), own[k].flatten(), dim=0) for k in own]
            return torch.stack(cosines).mean()

        curve = vmap(similarity)(torch.linspace(0, 1, POINTS, dtype=image.dtype, device=image.device))
        return torch.trapezoid(curve, dx=1 / (POINTS - 1))

    # one image after another, so that memory is that of 21 gradients
    return torch.stack([of_one(*one) for one in zip(images, labels, noise, strict=True)])


def accuracy_score(victim: Victim, params: Params, buffers: Buffers, images: Tensor) -> float:
    """How unlike the network's Jacobians are on the images [N, C, H, W]: -sum(ln(l + 1e-5) + 1 / (l + 1e-5)) over the
    eigenvalues l of their correlation matrix (a score without training, after Mellor et al. 2021); higher is better.

    A Jacobian is that of the summed logits, with respect to the image as the network sees it, in evaluation mode.
    params: of an untrained model. The score is at most about -N: the reference's -85 with 100 images is within reach
    because it keeps one image per class of them, see ``one_per_class``.
    """

    def total(inputs: Tensor) -> Tensor:
        return victim.logits(params, buffers, inputs, training=False)[0].sum()

    jacobians: Tensor = grad(total)(images)  # evaluation mode: examples do not touch each other
    if victim.std is not None:
        jacobians = jacobians * victim.std.to(jacobians).view(-1, 1, 1)
    values = torch.linalg.eigvalsh(torch.corrcoef(jacobians.flatten(1).double())) + FLOOR
    return float(-(values.log() + 1 / values).sum())


def one_per_class(labels: Tensor) -> Tensor:
    """Positions of the first example of each class, as the reference picks those of its accuracy score."""
    seen: dict[int, int] = {}
    for position, label in enumerate(labels.tolist()):
        seen.setdefault(label, position)
    return torch.tensor(list(seen.values()), dtype=torch.int64)


@final
@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Best first: the lowest alpha * privacy + (1 - alpha) * variance among those of enough accuracy.

    alpha: in [0, 1], 0.7 in the reference (1 ranks by privacy alone); min_accuracy: -85 in the reference, for those of
    100 images of CIFAR-100 that differ in class and ResNet20-4; other models and numbers of images need another one.
    """

    alpha: float = 0.7
    min_accuracy: float = -85.0

    def __post_init__(self) -> None:
        check("ats search: alpha", self.alpha, lambda a: 0 <= a <= 1, "lie in [0, 1]")
        check("ats search: min_accuracy", self.min_accuracy, lambda a: not math.isnan(a), "be a number")

    def value(self, scored: Scored) -> float:
        """What is minimised."""
        return self.alpha * scored.privacy + (1 - self.alpha) * scored.variance

    def sort(self, candidates: Sequence[Scored]) -> list[Scored]:
        """Those of enough accuracy, best first."""
        return sorted((c for c in candidates if c.accuracy >= self.min_accuracy), key=self.value)
