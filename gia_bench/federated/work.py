"""What local work is to everybody else: a client's part of a round, whatever it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from gia_bench.defenses.base import Defense
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Buffers, Noise, Params, Update


class LocalResult(NamedTuple):
    """One client's raw update, its buffers afterwards, and its mean loss over the local steps (scalar)."""

    update: Update
    buffers: Buffers
    loss: Tensor


class LocalWork(Protocol):
    """One client's part of a round. ``learning_rate`` is that of a local step, None where there is none."""

    @property
    def learning_rate(self) -> float | None: ...

    @property
    def sampling(self) -> str:
        """How examples get into its steps: "shuffled" or "poisson"."""
        ...

    def poisson_rate(self, num_examples: int) -> float | None:
        """The chance of each example, whoever else is in, to be in a step; None where batches are shuffled."""
        ...

    def at(self, round_index: int) -> LocalWork:
        """The work as it is done in one round, with that round's learning rate."""
        ...

    def schedule(self, num_examples: int, seed: int, round_index: int, client: int) -> list[Tensor]:
        """The positions in the client's data that each local step uses, one int64 tensor per step. How many steps, and
        of what sizes if shuffled, depends on ``num_examples`` alone."""
        ...

    def weight(self, num_examples: int, steps: Sequence[Tensor]) -> int:
        """The number of examples this client's update stands for."""
        ...

    def run(
        self, victim: Victim, defense: Defense, params: Params, buffers: Buffers, batch: Batch, noise: Noise,
        counts: Sequence[int] | None,
    ) -> LocalResult:  # fmt: skip
        """The work itself, pure and mappable. batch: [S, B, ...]; counts: real examples of each step, to cut off the
        padding exactly, or None to leave it to the mask."""
        ...

    def plan(self, num_examples: int) -> list[list[slice]]:
        """What is public about a client's steps: for every pass over its data, the places in that pass's order that
        each step takes. Who stands at which place is drawn by the client and nobody else knows it."""
        ...

    def scale(self, num_examples: int) -> float:
        """The update of a gradient that stays the same from step to step, as a multiple of it."""
        ...

    def multiple(self, num_examples: int) -> float | None:
        """The factor where the update is nothing but a multiple of one gradient of the mean loss over all examples, at
        the weights sent out; else None."""
        ...

    def simulate(self, victim: Victim, params: Params, buffers: Buffers, passes: Sequence[Batch]) -> Update:
        """The update of an undefended client whose e-th pass walks through ``passes[e]`` [B, ...] from front to back;
        differentiable in them through every step. Where passes are missing, the last one is walked through again.
        """
        ...
