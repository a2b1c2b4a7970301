"""MixUp and InstaHide: clients train on mixtures of their images; InstaHide flips the pixels' signs too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.per_example import per_example
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Examples, Noise, Params, Shared, State, Update

TRIES = 1000
"""Draws of one image's coefficients before bounds count as out of reach."""


@final
@dataclass(frozen=True, kw_only=True)
class MixUp(Defense):
    """Each image becomes a mixture of ``klam`` distinct images of its local step, with its labels in the same shares.

    As compared by GradAttack (Huang et al. 2021): coefficients are Dirichlet(concentration, 1, ..., 1), the first one
    for the image itself, drawn again until all lie in [lower_bound, upper_bound]. klam: 1 or more, 1 changes no pixel;
    concentration: > 0. num_classes: of the labels' probabilities, None for the model's.

    Images are mixed within one local step, every one in ``klam`` mixtures (GradAttack: within all of a client's data).
    A step with fewer examples mixes all it has, and their coefficients follow the same law (gia_bench choice). Padding
    enters no mixture. Accuracy is that on unmixed test images, and an attack is measured against the private images.
    With DP-SGD in a ``Chain`` it is mixtures that are clipped: the epsilon is not one of single private examples.

    Raises ``ConfigError`` for bounds that no coefficients can keep, and ``IncompatibleError`` for a local step with too
    few examples to mix, when a run is composed and again for every draw (attackers simulate clients with steps of other
    sizes): alone an image would be sent as it is.
    """

    klam: int = 4
    concentration: float = 3.0
    upper_bound: float = 1.0
    lower_bound: float = 0.0
    num_classes: int | None = None

    def __post_init__(self) -> None:
        where = "defense mixup"
        check(f"{where}: klam", self.klam, lambda k: k >= 1 and k == int(k), "be a whole number, at least 1")
        check(f"{where}: concentration", self.concentration, lambda a: 0 < a < math.inf, "be finite and above 0")
        k = self.klam
        check(
            f"{where}: upper_bound", self.upper_bound, lambda b: b <= 1 and b * k >= 1,
            f"lie in [1 / klam, 1] = [{1 / k:g}, 1], since the coefficients sum to 1",
        )  # fmt: skip
        check(
            f"{where}: lower_bound", self.lower_bound, lambda b: b >= 0 and b * k <= 1,
            f"lie in [0, 1 / klam] = [0, {1 / k:g}], since the coefficients sum to 1",
        )  # fmt: skip
        if self.num_classes is not None:
            check(
                f"{where}: num_classes", self.num_classes, lambda n: n >= 1 and n == int(n),
                "be a whole number of at least 1, or null",
            )  # fmt: skip

    def check_victim(self, victim: Victim) -> None:
        """Needs as many classes as the model has."""
        if self.num_classes not in (None, victim.num_classes):
            raise IncompatibleError(
                f"defense mixup: num_classes={self.num_classes}, but the model has {victim.num_classes}; leave it null."
            )

    def check_steps(self, sizes: Collection[int]) -> None:
        """Needs enough examples to mix in every step, and coefficients that can be drawn within the bounds."""
        for size in sorted(sizes):
            if not size:  # an empty Poisson batch has nothing to mix, and nothing to hide
                continue
            self._coefficients(size, min(int(self.klam), size), stream(0, "mixup", size))

    def calibrate(self, victim: Victim, public: Examples) -> Defense:
        """Takes the number of classes."""
        return self.bound(victim)

    def bound(self, victim: Victim) -> MixUp:
        """The same mixing for the model's number of classes."""
        return dataclasses.replace(self, num_classes=victim.num_classes)

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """``partners`` [S, B, klam]: which examples of the step are mixed, the image itself first; ``coefficients``
        [S, B, klam]: their shares, 0 where a step has fewer examples."""
        klam = int(self.klam)
        drawn: list[tuple[Tensor, Tensor]] = []
        for real in batch.mask.cpu() > 0:
            rows = real.nonzero().view(-1)
            partners = torch.arange(len(real))[:, None].repeat(1, klam)
            shares = torch.zeros(len(real), klam)
            shares[:, 0] = 1
            if len(rows):
                k = min(klam, len(rows))
                partners[rows, :k] = rows[cycle(len(rows), k, generator)]
                shares[rows, :k] = self._coefficients(len(rows), k, generator)
            drawn.append((partners, shares))
        return {
            "partners": torch.stack([p for p, _ in drawn]),
            "coefficients": torch.stack([c for _, c in drawn]),
        }

    def transform(self, batch: Batch, noise: Noise) -> Batch:
        """The mixed images, and labels as probabilities [S, B, classes]."""
        labels = self._probabilities(batch.labels, batch.inputs.dtype)
        return Batch(mixed(batch.inputs, noise), mixed(labels, noise), batch.mask)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update itself: that of the mixtures, which an attacker would rebuild."""
        return update, state

    def _coefficients(self, count: int, k: int, generator: torch.Generator) -> Tensor:
        """Shares [count, k] within the bounds, rows summing to 1."""
        high, low = self.upper_bound, self.lower_bound
        if k == 1 < self.klam or high * k < 1:
            raise IncompatibleError(
                f"defense mixup: a local step has {count} example(s), too few to mix with klam={self.klam} and "
                f"upper_bound={high}, which need at least {max(2, math.ceil(1 / high))}; choose fl.local.batch_size so "
                "that no step has fewer, the last of a pass included (null: all that a client holds), or klam=1 with "
                "upper_bound=1, which mix nothing."
            )
        rates = torch.ones(count, k, dtype=torch.float64)
        rates[:, 0] = self.concentration
        shares = torch.full_like(rates, torch.nan)
        for _ in range(TRIES):
            outside = ~((shares.amax(1) <= high) & (shares.amin(1) >= low))
            if not outside.any():
                return shares.float()
            gammas = torch._standard_gamma(rates[outside], generator=generator)
            shares[outside] = gammas / gammas.sum(1, keepdim=True)
        raise ConfigError(
            f"defense mixup: {TRIES} draws gave no coefficients of {k} images within [{low}, {high}]; widen "
            "lower_bound and upper_bound, or set concentration nearer to 1."
        )

    def _probabilities(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Labels [S, B] as probabilities [S, B, classes]; probabilities stay as they are."""
        if labels.is_floating_point():
            return labels
        if self.num_classes is None:
            raise ConfigError("defense mixup: num_classes is not known; call calibrate(victim, public) first.")
        # compared, because torch's one_hot looks at the values, which vmap forbids
        return (labels[..., None] == torch.arange(self.num_classes, device=labels.device)).to(dtype)


@final
@dataclass(frozen=True, kw_only=True)
class InstaHide(Defense):
    """MixUp within one local step, and then a fresh random sign for every pixel and channel (Huang et al., ICML 2020).

    The paper flips images as the network sees them, normalised. Here images come before the normalisation, so a
    mixture x becomes center + s (x - center): its normalised value is x's, or minus x's. mixing: how images are mixed,
    with upper_bound 0.65 in GradAttack's InstaHide setting; center: one number per channel, or a single one, or None
    for the model's mean, which is 0 where the model does not normalise; then pixels lie in [-1, 1].

    Accuracy is that on plain test images; the paper also encodes the test images, which is not done here. A plain
    test image is unlike what was trained on, so this accuracy is lower than the paper's.
    """

    mixing: MixUp
    center: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for value in self.center or ():
            check("defense instahide: center", value, math.isfinite, "hold finite numbers, or be null")

    def check_victim(self, victim: Victim) -> None:
        """Needs as many classes and channels as the model has."""
        self.mixing.check_victim(victim)
        channels = victim.input_shape[0]
        if self.center is not None and len(self.center) not in (1, channels):
            raise IncompatibleError(
                f"defense instahide: center has {len(self.center)} numbers, but images have {channels} channel(s); "
                "give one number, one per channel, or null."
            )

    def check_steps(self, sizes: Collection[int]) -> None:
        """Those that can be mixed."""
        self.mixing.check_steps(sizes)

    def calibrate(self, victim: Victim, public: Examples) -> Defense:
        """Takes the number of classes, and the center where none is given."""
        mean = (0.0,) if victim.mean is None else tuple(victim.mean.tolist())
        center = mean if self.center is None else tuple(self.center)
        return dataclasses.replace(self, mixing=self.mixing.bound(victim), center=center)

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """MixUp's, and ``signs`` [S, B, C, H, W]: +1 or -1, int8."""
        shape = batch.inputs.shape[2:]

        def of(count: int) -> Noise:
            bits = torch.randint(2, (count, *shape), generator=generator, dtype=torch.int8)
            return {"signs": bits * 2 - 1}

        return self.mixing.draw(like, batch, generator) | per_example(batch.mask, of, {"signs": 1})

    def transform(self, batch: Batch, noise: Noise) -> Batch:
        """The mixed and flipped images, and labels as probabilities [S, B, classes]."""
        if self.center is None:
            raise ConfigError("defense instahide: center is not known; call calibrate(victim, public) first.")
        batch = self.mixing.transform(batch, noise)
        center = batch.inputs.new_tensor(list(self.center)).view(-1, 1, 1)
        signs = noise["signs"]
        # where, and not a product, so that a pixel with the sign +1 keeps its bits
        return batch._replace(inputs=torch.where(signs > 0, batch.inputs, 2 * center - batch.inputs))

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update itself: that of the encoded images, which an attacker would rebuild."""
        return update, state


def cycle(count: int, k: int, generator: torch.Generator) -> Tensor:
    """Positions [count, k], distinct in each row: i itself and the next k - 1 in a random cycle through all.

    A row's others are a random choice, as from k random orders, and every position occurs exactly k times.
    """
    order = torch.randperm(count, generator=generator)
    steps = torch.arange(count)[:, None] + torch.arange(k)
    rows = torch.empty(count, k, dtype=torch.int64)
    rows[order] = order[steps % count]
    return rows


def mixed(values: Tensor, noise: Noise) -> Tensor:
    """sum_j coefficients[..., j] * values[..., partners[..., j], ...] for values [S, B, ...]."""
    partners, shares = noise["partners"], noise["coefficients"].to(values.dtype)
    total = torch.zeros_like(values)
    trailing = (1,) * (values.ndim - 2)
    for j in range(partners.shape[-1]):
        chosen = torch.take_along_dim(values, partners[..., j].view(*partners.shape[:2], *trailing), dim=1)
        total = total + shares[..., j].view(*shares.shape[:2], *trailing) * chosen
    return total
