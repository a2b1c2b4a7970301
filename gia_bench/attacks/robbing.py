"""Robbing the Fed: a planted layer sorts the images of a batch into bins (Fowl et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

from torch import Tensor

from gia_bench.attacks.base import FORGET, Attack, Broadcast, Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.imprint import (
    CONNECTIONS,
    Bins,
    Functional,
    Measured,
    Random,
    check_block,
    differences,
    implanted,
    measuring,
    quotients,
    read_images,
)
from gia_bench.errors import ConfigError, choices
from gia_bench.models.functional import Victim
from gia_bench.models.imprint import ImprintBlock
from gia_bench.seeding import stream
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Examples, Observation, Reconstruction

RANDOM, MEASURED = Random(), Measured()
KEEP = ("largest", "smallest")


@final
@dataclass(frozen=True, kw_only=True)
class RobbingTheFed(Attack):
    """Every row of the planted layer measures the same functional h of the image, and row i is on where h(x) > bin i.

    The gradients of rows i and i + 1 differ by the images of bin i alone: their difference in the weights over that in
    the bias is the image, or a weighted mean of the images that share the bin. Exact on an unprotected update of one
    local step. The reference takes differences to the row before and so mixes all images in its first row; here,
    as in the paper, the last row (above the highest cut) stands for itself.

    num_bins: rows of the layer; functional: h, of the flattened image as the network sees it; bins: where they are cut;
    connection: "linear" | "linear_mean" | "addition", how the layer's values reach the model: "linear", the authors',
    saturates models with sigmoids (``imprint.CONNECTIONS``); gain: factor of the layer's weight and bias; keep: of more
    hits than images, those with the "largest" |mean of the weight's difference| (authors) or "smallest" (breaching);
    tolerance: a bin is hit where the bias's difference is more than this share of the largest entry of the bias's
    gradient, since rounding leaves something in empty bins (gia_bench choice; reference: 0); labels: how labels are
    read off the rest of the update.
    """

    num_bins: int = 128
    functional: Functional = RANDOM
    bins: Bins = MEASURED
    connection: str = "addition"
    gain: float = 1e-3
    keep: str = "largest"
    tolerance: float = 1e-6
    labels: str = "auto"

    def __post_init__(self) -> None:
        check_block(self.num_bins, self.connection, self.gain, self.labels)
        check(0 <= self.tolerance < 1, "attack.tolerance", self.tolerance, "a share in [0, 1)")
        if self.keep not in KEEP:
            raise ConfigError(choices("attack.keep", self.keep, KEEP))

    @property
    def requires(self) -> Knowledge:
        shown = Knowledge.LABELS if self.labels == "known" else Knowledge.NONE
        return Knowledge.NUM_EXAMPLES | shown | self.bins.requires

    @property
    def needs(self) -> Power:
        return Power.CHANGE_MODEL

    @property
    def max_local_steps(self) -> int | None:
        """From the second step on the layer is no longer the one that was sent, and rows do not differ by one bin."""
        return 1

    def tamper(self, honest: Broadcast, *, seed: int, public: Examples | None = None) -> Broadcast:
        """The honest model behind the layer."""
        victim, like = honest.victim, next(iter(honest.params.values()))
        N = prod(victim.input_shape)
        weights = self.functional(N, stream(seed, "functional"))
        cuts = self.bins.cuts(self.num_bins, measuring(victim, weights, public))
        block = ImprintBlock(
            (self.gain * weights).expand(self.num_bins, N).to(like),
            (-self.gain * cuts).to(like),
            CONNECTIONS[self.connection](self.num_bins, N, self.gain, float(cuts.mean())).to(like),
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
        return [read_images(o, victim, self.labels, self._read) for o in observations]

    def _read(self, rows: Tensor, entries: Tensor, B: int) -> Tensor:
        own_rows, own_entries = differences(rows), differences(entries)
        images, places = quotients(own_rows, own_entries, self.tolerance, float(entries.abs().max()))
        strength = own_rows[places].mean(1).abs()
        order = strength.argsort(descending=self.keep == "largest", stable=True)
        return images[order[:B]]
