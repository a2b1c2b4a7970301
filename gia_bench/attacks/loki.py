"""LOKI: kernels of its own for every client keep the images of all of them apart, even in one sum (S&P 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.base import FORGET, Attack, Broadcast, Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.imprint import (
    ROWS,
    Average,
    Bins,
    Functional,
    Measured,
    check_block,
    implanted,
    measuring,
    quotients,
    read_images,
)
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.models.imprint import KERNELS, AddMean, IdentitySets, ImprintBlock
from gia_bench.seeding import stream
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Examples, Observation, Reconstruction

AVERAGE, MEASURED = Average(), Measured()
DIVISORS = ("constant", "maximum")


@final
@dataclass(frozen=True, kw_only=True)
class Loki(Attack):
    """Robbing the Fed behind one convolution whose kernels differ from client to client (Zhao et al. 2024).

    Of the kernels each client has a set of its own (an identity mapping set) that hands its images on, and the others
    are 0. So each client's images reach columns of the planted layer that no other client's reach, and the sum over the
    clients keeps them apart; one layer of a few rows per image of one client serves all. The columns behind other
    clients' sets are 0 too (as in the authors' MANDRAKE, Zhao et al., CVPR 2023): nothing crosses over, exactly. The
    sum tells which client an image belongs to, though reconstructions are handed out without it.

    num_bins: rows, at least 2; functional, bins: what they measure, and where that is cut, as in ``RobbingTheFed``;
    activation: "hardtanh", a row is on in its own bin alone, so that in FedAvg it stays what was sent until its own
    image comes, or "relu", bins are differences, for one local step.

    Two things decide what FedAvg's local steps leave readable. Its update is a difference of float32 weights, in which
    an image drowns if what it leaves is small beside the weight. And what an image leaves moves its row: too far, and
    the row catches other images. scale: of the kernels, while the weight that measures is divided by it (the paper's
    convolutional scaling factor): what is left grows with it, beside a weight that shrinks. copies: how often a set
    hands the image on. 1 (paper): the columns that measure an image hold its imprint too, and the scale has to be right
    for learning rate, model and batch: for a sigmoid LeNet 1,000, with gain=1. 2 (gia_bench choice): a second copy
    reaches columns of weight 0, which hold the imprint to the last digit however small it is. gain: of the rows' mean
    in the image that the model sees, and so of all that is sent back: then it may be so small that rows and kernels
    hold still (gia_bench choice). One local step under FedSGD is exact with any of them.

    divisor: what a weight row is divided by to be an image. "maximum": its own largest entry (paper), since bias
    entries of all clients are summed; right for images with a pixel of 1, too bright else, and for victims that do not
    normalise. "constant" (gia_bench choice): each set has one kernel more, of 0 with a bias, whose columns hold that
    client's own sum of gradients: exact. tolerance, labels: as in ``RobbingTheFed``. The model sees the image plus the
    rows' mean times gain (gia_bench choice: a second layer, as in the paper, would change with the local steps).
    """

    num_bins: int = 256
    functional: Functional = AVERAGE
    bins: Bins = MEASURED
    activation: str = "hardtanh"
    scale: float = 1.0
    copies: int = 2
    gain: float = 1e-3
    divisor: str = "constant"
    tolerance: float = 1e-6
    labels: str = "auto"

    def __post_init__(self) -> None:
        check_block(self.num_bins, "addition", self.gain, self.labels)
        check(self.num_bins >= 2, "attack.num_bins", self.num_bins, "at least 2")
        check(0 < self.scale < inf, "attack.scale", self.scale, "a number above 0")
        check(self.copies in (1, 2), "attack.copies", self.copies, "1 or 2")
        check(0 <= self.tolerance < 1, "attack.tolerance", self.tolerance, "a share in [0, 1)")
        for name, value, known in (("activation", self.activation, ROWS), ("divisor", self.divisor, DIVISORS)):
            if value not in known:
                raise ConfigError(choices(f"attack.{name}", value, known))

    @property
    def requires(self) -> Knowledge:
        shown = Knowledge.LABELS if self.labels == "known" else Knowledge.NONE
        return Knowledge.NUM_EXAMPLES | shown | self.bins.requires

    @property
    def needs(self) -> Power:
        return Power.CHANGE_MODEL

    @property
    def personal(self) -> bool:
        """Every client gets kernels of its own."""
        return True

    @property
    def max_local_steps(self) -> int | None:
        """Differences of rows need rows that have not moved."""
        return 1 if self.activation == "relu" else None

    def check_victim(self, victim: Victim) -> None:
        """The paper's divisor is about pixels in [0, 1]."""
        if self.divisor == "maximum" and victim.mean is not None:
            raise IncompatibleError(
                "attack.divisor=maximum takes a pixel of 1 for the largest entry, which is not so where the victim "
                "normalises; take attack.divisor=constant, or model.normalize=false."
            )

    def tamper(self, honest: Broadcast, *, seed: int, public: Examples | None = None) -> Broadcast:
        """What the only client of a cohort gets."""
        return self.tamper_for(honest, 0, 1, seed=seed, public=public)

    def tamper_for(
        self, honest: Broadcast, place: int, num_clients: int, *, seed: int, public: Examples | None = None
    ) -> Broadcast:
        """The honest model behind the layer and kernels of which those of the set ``place`` alone are not 0."""
        victim, like = honest.victim, next(iter(honest.params.values()))
        C, H, W = victim.input_shape
        weights = self.functional(C * H * W, stream(seed, "functional"))
        cuts = self.bins.cuts(self.num_bins, measuring(victim, weights, public))
        rows = ROWS[self.activation]
        slopes = rows.slopes(cuts)
        columns = weights.new_zeros(self.num_bins, num_clients, (self.copies * C + 1) * H * W)
        columns[:, place, : C * H * W] = slopes[:, None] * weights / self.scale
        sets = IdentitySets(num_clients, C, self.copies, place, self.scale)
        block = ImprintBlock(
            columns.flatten(1).to(like), (-slopes * cuts).to(like), AddMean(self.gain), rows.activation, sets.to(like)
        )
        return implanted(block, honest)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        return [read_images(o, victim, self.labels, partial(self._read, o.params, victim)) for o in observations]

    def _read(self, params: dict[str, Tensor], victim: Victim, rows: Tensor, entries: Tensor, B: int) -> Tensor:
        """The images of every client whose kernels were sent: of one, or of all in the mean of what all were sent."""
        C, H, W = victim.input_shape
        columns = rows.view(len(rows), -1, (self.copies * C + 1) * H * W)
        sent = params[KERNELS].view(columns.shape[1], -1).any(1)
        found = [self._of_one(columns[:, place], C * H * W, H * W) for place in sent.nonzero().flatten()]
        images, strength = (torch.cat(parts) for parts in zip(*found, strict=True))
        return images[strength.argsort(descending=True, stable=True)[:B]]

    def _of_one(self, columns: Tensor, num_pixels: int, num_constants: int) -> tuple[Tensor, Tensor]:
        """One client's images [n, N], and the |mean| of the rows they were read from [n]."""
        imprints, constants = columns[:, -num_pixels - num_constants : -num_constants], columns[:, -num_constants:]
        own = ROWS[self.activation].own
        if self.divisor == "maximum":
            rows = own(imprints)
            # the sign is that of the row's own sum: pixels are not negative
            divisors, largest = rows.abs().amax(1) * rows.sum(1).sign(), imprints.abs().max()
        else:
            rows, sums = own(imprints), constants.mean(1)
            divisors, largest = own(sums), sums.abs().max()
        images, places = quotients(rows, divisors, self.tolerance, float(largest))
        return images, rows[places].mean(1).abs()
