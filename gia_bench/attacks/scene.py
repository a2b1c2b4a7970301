"""What one candidate and its victim look like to the parts of an attack, and the coordinates that are searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

from torch import Tensor

from gia_bench.models.functional import Victim
from gia_bench.values import Observation


class Scene(NamedTuple):
    """Everything an attacker knows about one victim."""

    victim: Victim
    observation: Observation


class Candidate(NamedTuple):
    """One guess. pixels: [B, C, H, W] in the searched coordinates; inputs: the same as images in [0, 1];
    labels: [B] int64, or [B, classes] probabilities.
    """

    pixels: Tensor
    inputs: Tensor
    labels: Tensor


@final
@dataclass(frozen=True, eq=False)
class PixelSpace:
    """The coordinates in which images are searched: as the network sees them, normalised where the victim normalises.

    The references search there (Geiping et al. 2020), so that a learning rate, a total variation and a standard normal
    guess mean what they mean in the papers. mean, std: [C, 1, 1]; same: whether pixels are the images.
    """

    mean: Tensor
    std: Tensor
    same: bool = False

    @classmethod
    def of(cls, victim: Victim, like: Tensor) -> PixelSpace:
        """The victim's normalisation, in the dtype and on the device of ``like``."""
        if victim.mean is None or victim.std is None:
            return cls(like.new_zeros(1, 1, 1), like.new_ones(1, 1, 1), same=True)
        mean, std = (t.to(like).view(-1, 1, 1) for t in (victim.mean, victim.std))
        return cls(mean, std)

    def decode(self, pixels: Tensor) -> Tensor:
        """Images in [0, 1] (not clamped)."""
        return pixels if self.same else pixels * self.std + self.mean

    def encode(self, images: Tensor) -> Tensor:
        """The inverse of ``decode``."""
        return images if self.same else (images - self.mean) / self.std

    def clamp(self, pixels: Tensor) -> Tensor:
        """The nearest pixels whose images lie in [0, 1]."""
        return pixels.clamp(-self.mean / self.std, (1 - self.mean) / self.std)


def update_unit(observation: Observation) -> float:
    """What updates are divided by before they are compared (``Observation.unit``)."""
    return observation.unit
