"""Auxiliary images with the updates that clients who held them would have sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.inverter import Lesson
from gia_bench.attacks.rehearsal import Rehearsal
from gia_bench.attacks.sketch import Sketch
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Observation, Update

PILOT = 64
"""Updates by which tensors are brought to one scale (gia_bench choice)."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Material:
    """images [N, C, H, W] and labels [N] of which ``num_held`` at the end are never trained on; count: B. Updates of B
    images, drawn into company anew every ``renew`` epochs. Raises ``IncompatibleError`` for observations that do not
    show what is needed, and for too few examples."""

    rehearsal: Rehearsal
    sketch: Sketch
    images: Tensor
    labels: Tensor
    num_held: int
    count: int
    renew: int | None
    varies: bool
    held_out: Lesson
    _made: dict[int, Lesson] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        observation: Observation,
        victim: Victim,
        *,
        num_examples: int | None,
        holdout: float,
        projection: int | None,
        scaled: bool,
        renew: int | None,
        chunk_size: int,
        seed: int,
    ) -> Material:
        """For victims that look like ``observation``."""
        public, count = observation.public, observation.num_examples
        if public is None or count is None:
            raise IncompatibleError(
                "A learned inverter trains on examples that no client holds, and must know how many an update stands "
                "for; take threat=curious_server_public or threat=adaptive_public."
            )
        if not observation.update:
            raise IncompatibleError("The observed update holds no tensor, so there is nothing to invert.")
        total = min(num_examples or len(public), len(public))
        held = max(round(holdout * total), count)
        if total - held < count:
            raise IncompatibleError(
                f"{total} auxiliary example(s) do not make one update of {count} to train on and one to hold out; take "
                "more of them (public.split, attack.num_examples)."
            )
        like = next(iter(observation.params.values()))
        rows = torch.randperm(len(public), generator=stream(seed, "auxiliary"))[:total]
        images, labels = public.images(rows).to(like), public.labels[rows].to(like.device)
        rehearsal = Rehearsal(victim=victim, observation=observation, chunk_size=chunk_size, seed=seed)
        names = tuple(observation.update)
        company = torch.arange(total - held)[: (total - held) // count * count].view(-1, count)[:PILOT]
        pilot = _joined([_named(u, names) for u in rehearsal.updates(images[company], labels[company], "pilot")])
        sketch = Sketch.of(pilot, projection, scaled=scaled, seed=seed)
        kept = torch.arange(total - held, total)[: held // count * count].view(-1, count)
        features = [sketch(_named(u, names)) for u in rehearsal.updates(images[kept], labels[kept], "held_out")]
        return cls(
            rehearsal=rehearsal, sketch=sketch, images=images, labels=labels, num_held=held, count=count, renew=renew,
            varies=count > 1 or rehearsal.varies(images[:count], labels[:count]),
            held_out=Lesson(torch.cat(features), images[kept].flatten(2)),
        )  # fmt: skip

    def training(self, epoch: int) -> Lesson:
        """The lessons of an epoch; made once where nothing random is in them."""
        generation = epoch // self.renew if self.renew is not None and self.varies else 0
        if generation not in self._made:
            self._made.clear()
            self._made[generation] = self._simulated(generation)
        return self._made[generation]

    def _simulated(self, generation: int) -> Lesson:
        free = len(self.images) - self.num_held
        order = torch.randperm(free, generator=stream(self.rehearsal.seed, "company", generation))
        company = order[: free // self.count * self.count].view(-1, self.count)
        updates = self.rehearsal.updates(self.images[company], self.labels[company], "lesson", generation)
        names = tuple(self.sketch.scales)
        features = torch.cat([self.sketch(_named(u, names)) for u in updates])
        return Lesson(features, self.images[company].flatten(2))


def _named(update: Update, names: tuple[str, ...]) -> Update:
    """The tensors that are observed."""
    return {k: update[k] for k in names}


def _joined(parts: list[Update]) -> Update:
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
