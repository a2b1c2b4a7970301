"""What attacks that plant a layer share: what its rows measure, where bins lie, and reading images off the rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, final

import torch
from torch import Tensor, nn

from gia_bench.attacks.base import Broadcast
from gia_bench.attacks.checks import check
from gia_bench.attacks.labels import METHODS
from gia_bench.attacks.scene import PixelSpace
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.models.imprint import BIAS, IMPRINT, WEIGHT, Activation, AddMean, Spread, in_front, unit_band
from gia_bench.threat import Knowledge
from gia_bench.values import Examples, Observation, Reconstruction

FAR = 10.0
"""The lowest bin begins this many standard deviations below the centre, so that every image lies above (reference)."""
GOLDEN = (3 - math.sqrt(5)) / 2
LABELS_READ = tuple(name for name in METHODS if name != "joint")

Functional: TypeAlias = Callable[[int, torch.Generator], Tensor]
"""(number of pixels N, generator) -> weights [N] float64 of a linear functional of the flattened image, as the network
sees it."""


@final
@dataclass(frozen=True)
class Random:
    """Normal weights of mean 0 and length 1 (Fowl et al. 2022, "randn"): about N(0, 1) on normalised images."""

    def __call__(self, num_pixels: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(num_pixels, generator=generator, dtype=torch.float64)
        return (drawn - drawn.mean()) / drawn.std() / math.sqrt(num_pixels)


@final
@dataclass(frozen=True, kw_only=True)
class Fourier:
    """A cosine over the flattened image, 4 max(mode, 0.33) / N cos(pi / N (n + 1/2) mode) ("fourier")."""

    mode: float = 32

    def __post_init__(self) -> None:
        check(self.mode >= 0, "fourier.mode", self.mode, "at least 0")

    def __call__(self, num_pixels: int, generator: torch.Generator) -> Tensor:
        n = torch.arange(num_pixels, dtype=torch.float64)
        return 4 * max(self.mode, 0.33) / num_pixels * (math.pi / num_pixels * (n + 0.5) * self.mode).cos()


@final
@dataclass(frozen=True)
class Average:
    """The mean pixel ("avg")."""

    def __call__(self, num_pixels: int, generator: torch.Generator) -> Tensor:
        return torch.full((num_pixels,), 1 / num_pixels, dtype=torch.float64)


class Bins(Protocol):
    """Where the range of a functional is cut, so that each bin gets the same share of images."""

    @property
    def requires(self) -> Knowledge: ...

    def cuts(self, num_bins: int, measure: Callable[[int], Tensor]) -> Tensor:
        """Lower ends [num_bins] float64, ascending, the first below every image. measure: (n) -> the functional's
        values on at most n public examples."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Normal:
    """Quantiles of a normal distribution. Right for ``Random`` on normalised images of white noise (reference)."""

    location: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check(self.scale > 0, "bins.scale", self.scale, "a number above 0")

    @property
    def requires(self) -> Knowledge:
        return Knowledge.NONE

    def cuts(self, num_bins: int, measure: Callable[[int], Tensor]) -> Tensor:
        standard = torch.special.ndtri(_shares(num_bins))
        return self.location + self.scale * torch.cat([standard.new_tensor([-FAR]), standard])


@final
@dataclass(frozen=True, kw_only=True)
class Laplace:
    """Quantiles of a Laplace distribution of standard deviation ``scale``; the reference's for ``Fourier``."""

    location: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check(self.scale > 0, "bins.scale", self.scale, "a number above 0")

    @property
    def requires(self) -> Knowledge:
        return Knowledge.NONE

    def cuts(self, num_bins: int, measure: Callable[[int], Tensor]) -> Tensor:
        centred = _shares(num_bins) - 0.5
        standard = -centred.sign() * torch.log1p(-2 * centred.abs()) / math.sqrt(2)
        return self.location + self.scale * torch.cat([standard.new_tensor([-FAR]), standard])


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """Quantiles of what public examples give (gia_bench choice; the paper has the server know the distribution).

    A cut is moved to between the two values around it, to a place that is on no grid of grey levels: few levels make
    many images equally bright, and for one that lies on a cut rounding would decide whether it is in the bin below, in
    the one above, or in none.

    num_examples: how many of them are looked at, from the first.
    """

    num_examples: int = 1000

    def __post_init__(self) -> None:
        check(self.num_examples >= 2, "bins.num_examples", self.num_examples, "at least 2")

    @property
    def requires(self) -> Knowledge:
        return Knowledge.PUBLIC

    def cuts(self, num_bins: int, measure: Callable[[int], Tensor]) -> Tensor:
        values = measure(self.num_examples)
        values, far = values.sort().values, FAR * values.std()
        # equally bright images differ in their last digits where the victim normalises
        same = 1e-9 * (values[-1] - values[0])
        known = torch.cat([values[:1], values[1:][values.diff() > same]])
        below = torch.searchsorted(known - same, torch.quantile(values, _shares(num_bins)), right=True) - 1
        # of those that fall between the same two values, each has its own place
        place = torch.arange(len(below), device=values.device) - torch.searchsorted(below, below)
        part = (place + GOLDEN) / below.bincount()[below]
        upper = torch.cat([known[1:], known[-1:] + far])[below]
        return torch.cat([known[:1] - far, known[below] + part * (upper - known[below])])


def _shares(num_bins: int) -> Tensor:
    return torch.arange(1, num_bins, dtype=torch.float64) / num_bins


CONNECTIONS: dict[str, Callable[[int, int, float, float], nn.Module]] = {
    "linear": lambda num_rows, num_pixels, gain, mean_bin: Spread(num_rows, num_pixels, gain, -mean_bin),
    "linear_mean": lambda num_rows, num_pixels, gain, mean_bin: Spread(
        num_rows, num_pixels, gain * num_rows, -mean_bin
    ),
    "addition": lambda num_rows, num_pixels, gain, mean_bin: AddMean(),
}
"""(rows K, pixels N, gain, mean of the bins) -> how the rows' values reach the model.

The authors' "linear" hands on the sum over the rows, which grows with their number: with 128 rows on normalised digits
every pixel of what the model sees is between 13 and 438, a LeNet's sigmoids saturate, and the gradients of some images
are 1e-18 of the largest, in any precision: their bins look empty. "linear_mean" (gia_bench choice) hands on the mean.
"""


def check_block(num_rows: int, connection: str, gain: float, labels: str) -> None:
    """Raises ``ConfigError`` for settings of a planted layer that are out of range."""
    check(num_rows >= 1, "attack: number of rows", num_rows, "at least 1")
    check(0 < gain < math.inf, "attack.gain", gain, "a number above 0")
    if connection not in CONNECTIONS:
        raise ConfigError(choices("attack.connection", connection, CONNECTIONS))
    if labels not in LABELS_READ:
        raise ConfigError(choices("attack.labels", labels, LABELS_READ))


def implanted(block: nn.Module, honest: Broadcast) -> Broadcast:
    """The honest model behind ``block``: its tensors as they are, under their own names."""
    module = in_front(block, honest.victim.module)
    new = {k: v.detach().clone() for k, v in module.named_parameters() if k.startswith(f"{IMPRINT}.")}
    params = {k: new[k] if k in new else honest.params[k] for k, _ in module.named_parameters()}
    return Broadcast(dataclasses.replace(honest.victim, module=module), params, honest.buffers)


def measuring(victim: Victim, weights: Tensor, public: Examples | None) -> Callable[[int], Tensor]:
    """(n) -> the values on the first n public examples, or all, of the functional with ``weights`` [N] float64."""

    def measure(count: int) -> Tensor:
        assert public is not None  # required by the bins that ask, and so checked
        return as_seen(victim, public.images(torch.arange(min(count, len(public)))).double()) @ weights

    return measure


@final
@dataclass(frozen=True, kw_only=True)
class Rows:
    """How rows that measure the same functional h tell bins apart. activation: theirs; slopes: (cuts [K]) -> what
    h - cut is multiplied with in each row; own: (the rows' gradients [K, ...]) -> what each bin alone has sent."""

    activation: Activation
    slopes: Callable[[Tensor], Tensor]
    own: Callable[[Tensor], Tensor]


def differences(values: Tensor) -> Tensor:
    """values [K, ...] minus those of the next row; the last row (above the highest cut) stands for itself."""
    return values - torch.cat([values[1:], values.new_zeros(1, *values.shape[1:])])


def band_slopes(cuts: Tensor) -> Tensor:
    """1 / the width of each bin, so that a row is in (0, 1) in its own bin alone. cuts: [K], K at least 2; the last bin
    is taken to be as wide as the first, which no image leaves either."""
    return 1 / torch.cat([cuts.diff(), (cuts[1] - cuts[0])[None]])


def _as_they_are(values: Tensor) -> Tensor:
    return values


ROWS = {
    "relu": Rows(activation=torch.relu, slopes=torch.ones_like, own=differences),
    "hardtanh": Rows(activation=unit_band, slopes=band_slopes, own=_as_they_are),
}
"""relu: on above the cut, and bins show in differences (Fowl et al.); hardtanh: on in the own bin alone, so that a row
holds still until its own image comes (Fowl et al. and Zhao et al. for FedAvg)."""


def as_seen(victim: Victim, images: Tensor) -> Tensor:
    """Images [n, C, H, W] in [0, 1], flattened and normalised as the network sees them: [n, N]."""
    space = PixelSpace.of(victim, images)
    return ((images - space.mean) / space.std).flatten(1)


Read: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""(weight rows [K, N], bias entries [K], number of images B) -> at most B flattened images [n, N]; all float64."""


def read_images(observation: Observation, victim: Victim, labels: str, read: Read) -> Reconstruction:
    """As many images as the update holds, from what ``read`` finds in the planted layer's part of it.

    Images that are not found are zeros, in the coordinates the network sees: the mean image where the victim
    normalises, else black (as in the reference). The score is the share that is not found. All is computed in float64:
    differences in float32 would lose what they are about. Raises ``IncompatibleError`` for the update of a model
    without the layer, or of an unknown number of images.
    """
    B, update = observation.num_examples, observation.update
    if WEIGHT not in update or BIAS not in update:
        raise IncompatibleError(
            f"This update holds no {WEIGHT!r}: it was not computed on what the malicious server sends. Let the clients "
            "play on the broadcast that the attack's tamper(...) returns."
        )
    if B is None:
        raise IncompatibleError(
            "A planted layer has more rows than there are images; take a threat that shows num_examples."
        )
    rows, entries = update[WEIGHT].double(), update[BIAS].double()
    whole = bool(rows.isfinite().all() and entries.isfinite().all())
    found = read(rows, entries, B) if whole else rows[:0]
    images = rows.new_zeros(B, *victim.input_shape)
    images[: len(found)] = found.view(-1, *victim.input_shape)
    return Reconstruction(
        inputs=PixelSpace.of(victim, images).decode(images).to(update[WEIGHT].dtype),
        labels=METHODS[labels](observation, victim),
        score=1 - len(found) / B if whole else math.inf,
        failure=None if whole else "the planted layer's update holds NaN or infinity",
    )


def quotients(rows: Tensor, entries: Tensor, tolerance: float, largest: float) -> tuple[Tensor, Tensor]:
    """rows / entries where |entry| > tolerance * largest and the quotient is finite [n, N], and those rows' places."""
    places = (entries.abs() > tolerance * largest).nonzero().flatten()
    images = rows[places] / entries[places, None]
    finite = images.isfinite().all(1)
    return images[finite], places[finite]
