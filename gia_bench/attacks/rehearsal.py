"""What clients with other images would have sent in the observed round: what learned attacks are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.func import grad, vmap

from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Noise, Observation, Update


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Rehearsal:
    """Clients that start from the model of ``observation``, do its local work and, where it is known, use its defense.

    They are new to the defense: nothing was withheld from earlier rounds, since a real client's residual is its own
    secret. Each draws the defense's random numbers, and its order of the examples in each pass, from a stream of its
    own, so that ``chunk_size`` (clients computed at once) changes no number. seed: of these streams.

    Raises ``IncompatibleError`` for an update behind which stand several clients, and where the defense is known and
    the local work is not.
    """

    victim: Victim
    observation: Observation
    chunk_size: int
    seed: int

    def __post_init__(self) -> None:
        seen = self.observation
        if seen.num_clients > 1:
            raise IncompatibleError(
                f"A rehearsed update is one client's, and this one is the mean of {seen.num_clients}; take a threat "
                "that sees single updates."
            )
        if seen.defense is not None and seen.local is None:
            raise IncompatibleError(
                "The defense can only be rehearsed together with the local work it protects; add local to threat.knows."
            )

    @torch.no_grad()
    def updates(self, images: Tensor, labels: Tensor, *place: int | str) -> Iterator[Update]:
        """Clients' updates, stacked, ``chunk_size`` at a time, in order. images: [N, B, C, H, W] in [0, 1]; labels:
        [N, B] int64; place: names the random numbers, together with the client's position."""
        for start in range(0, len(images), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            clients = range(start, min(start + self.chunk_size, len(images)))
            orders = torch.stack([self._orders(labels.shape[1], *place, client) for client in clients])
            yield self._chunk(images[rows], labels[rows], orders.to(images.device), [(*place, c) for c in clients])

    def varies(self, images: Tensor, labels: Tensor) -> bool:
        """Whether a client [B, ...] that sends twice may send two different updates."""
        if any(len(steps) > 1 for steps in self._plan(len(labels))):
            return True
        batch = Batch(images[None], labels[None], images.new_ones(1, len(labels)))
        return bool(self._noise(batch, "varies"))

    def _plan(self, count: int) -> list[list[slice]]:
        local = self.observation.local
        return [[slice(0, count)]] if local is None else local.plan(count)

    def _orders(self, count: int, *place: int | str) -> Tensor:
        """[passes, B]: who stands where in each pass; as given where a pass is one step, for there it is the same."""
        return torch.stack(
            [
                torch.randperm(count, generator=stream(self.seed, "pass_order", *place, e))
                if len(steps) > 1
                else torch.arange(count)
                for e, steps in enumerate(self._plan(count))
            ]
        )

    def _chunk(self, images: Tensor, labels: Tensor, orders: Tensor, places: list[tuple[int | str, ...]]) -> Update:
        seen = self.observation
        known = {**self.victim.initial()[1], **seen.buffers}
        # BatchNorm writes its statistics in place, which vmap allows only into tensors that are mapped too
        buffers = {k: v.to(images.device).expand(len(images), *v.shape) for k, v in known.items()}
        if seen.defense is None:
            passes = _gathered(images, labels, orders, torch.ones_like(orders, dtype=images.dtype))
            plain: Update = vmap(self._undefended)(passes, buffers)
            return plain
        steps, mask = self._steps(orders)
        batch = _gathered(images, labels, steps, mask.to(images))
        noises = [self._noise(Batch(*(t[row] for t in batch)), *place) for row, place in enumerate(places)]
        noise = {k: torch.stack([n[k].to(images.device) for n in noises]) for k in noises[0]}
        defended: Update = vmap(self._defended)(batch, buffers, noise)
        return defended

    def _steps(self, orders: Tensor) -> tuple[Tensor, Tensor]:
        """Whom each local step takes, and who of them is no padding: [N, S, width] both."""
        plan = self._plan(orders.shape[-1])
        taken = [orders[:, e, places] for e, steps in enumerate(plan) for places in steps]
        width = max(t.shape[1] for t in taken)
        steps = torch.stack([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in taken], 1)
        real = [torch.arange(width, device=orders.device) < t.shape[1] for t in taken]
        return steps, torch.stack(real).expand(len(orders), -1, -1)

    def _noise(self, batch: Batch, *place: int | str) -> Noise:
        """One client's random numbers; drawn outside vmap: inside, they would depend on the chunk size."""
        defense = self.observation.defense
        return {} if defense is None else defense.draw(self.observation.params, batch, self._stream(*place))

    def _stream(self, *place: int | str) -> torch.Generator:
        return stream(self.seed, "rehearsed_noise", *place)

    def _undefended(self, passes: Batch, buffers: Buffers) -> Update:
        """One client's update; passes: [passes, B, ...]."""
        seen = self.observation
        each = [Batch(*(t[e] for t in passes)) for e in range(len(passes.mask))]
        if seen.local is not None:
            return seen.local.simulate(self.victim, seen.params, buffers, each)
        gradient: Update = grad(lambda p: self.victim.objective(p, buffers, each[0])[0])(seen.params)
        return gradient

    def _defended(self, batch: Batch, buffers: Buffers, noise: Noise) -> Update:
        """What one client sends; batch: [S, B, ...]."""
        seen = self.observation
        assert seen.defense is not None and seen.local is not None
        counts = [places.stop - places.start for steps in self._plan(seen.num_examples or 0) for places in steps]
        return seen.defense.rehearse(
            self.victim, seen.local, seen.params, buffers, batch, seen.shared, noise, counts
        )  # fmt: skip


def _gathered(images: Tensor, labels: Tensor, indices: Tensor, mask: Tensor) -> Batch:
    """Of each client the examples ``indices`` [N, S, width]."""
    rows = torch.arange(len(images), device=images.device)[:, None, None]
    return Batch(images[rows, indices], labels[rows, indices], mask)
