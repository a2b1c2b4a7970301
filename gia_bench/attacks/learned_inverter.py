"""A network that learned to invert updates of this very round (Wu, Chen, Guo and Weinberger, UAI 2023)."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.analytic import METHODS_READ
from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.inverter import Course, Inverter, train
from gia_bench.attacks.labels import METHODS
from gia_bench.attacks.lessons import Material
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.seeding import derive
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Reconstruction


@final
@dataclass(frozen=True, kw_only=True)
class LearnedInverter(Attack):
    """Simulates the updates of auxiliary images that no client holds, trains a network from update to images, and
    rebuilds all victims of the round in one pass.

    Clients are simulated with the parameters and the local work that were observed and, where the threat model shows
    it, with the defense as it is: its ``protect``, its announcement and newly drawn random numbers (its residual
    excepted, which is a client's own). An attacker who does not know it simulates undefended clients. Batches are
    learned up to their order. One network serves all victims with the same parameters, defense, local work and number
    of examples; a victim's result does not depend on who they are, and ``seeds`` are not used.

    num_examples: auxiliary images taken, drawn by ``seed`` (None: all there are); holdout: the share of them that
    chooses the epoch and is not trained on (gia_bench choice; the authors choose by their test set); projection: size
    of the hashed update (``sketch.Sketch``; None: the whole update); standardized: features have mean 0 and variance 1
    over the first epoch's, and tensors one scale before they are hashed (gia_bench choice; the authors' are raw);
    renew: epochs after which company and random numbers are drawn anew (None: never); hidden, num_layers: of the ReLU
    network with a sigmoid at its end; epochs, batch_size (updates), learning_rate, decay_at (a share of the epochs),
    decay: of Adam; labels: how labels are found, which are returned and take no part (``labels.METHODS`` without
    ``joint``); chunk_size: clients simulated at once, without effect on the numbers; snapshot_every: epochs; seed: of
    everything random here.

    The score is the mean squared error on the held-out auxiliary examples, the same for all victims of one network: it
    says what the attacker may expect, and for one who does not know the defense it expects too much. Raises
    ``IncompatibleError`` where the auxiliary examples are too few.
    """

    num_examples: int | None = None
    holdout: float = 0.1
    projection: int | None = None
    standardized: bool = True
    renew: int | None = 1
    hidden: int = 3000
    num_layers: int = 2
    epochs: int = 200
    batch_size: int = 256
    learning_rate: float = 1e-4
    decay_at: float = 0.75
    decay: float = 0.1
    labels: str = "auto"
    chunk_size: int = 64
    snapshot_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "num_layers", "epochs", "batch_size", "chunk_size", "snapshot_every"):
            check(getattr(self, name) >= 1, f"attack.{name}", getattr(self, name), "at least 1")
        for name in ("num_examples", "projection", "renew"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"attack.{name}", value, "at least 1, or null")
        check(0 < self.holdout < 1, "attack.holdout", self.holdout, "a share above 0 and below 1")
        check(self.learning_rate > 0, "attack.learning_rate", self.learning_rate, "a number above 0")
        check(0 <= self.decay_at <= 1, "attack.decay_at", self.decay_at, "a share in [0, 1]")
        check(self.decay > 0, "attack.decay", self.decay, "a number above 0")
        if self.labels not in METHODS_READ:
            raise ConfigError(choices("attack.labels", self.labels, METHODS_READ))

    @property
    def requires(self) -> Knowledge:
        shown = Knowledge.LABELS if self.labels == "known" else Knowledge.NONE
        return Knowledge.NUM_EXAMPLES | Knowledge.PUBLIC | shown

    def check_victim(self, victim: Victim) -> None:
        """Labels that are read off the last layer need a linear one."""
        if self.labels != "known" and victim.head is None:
            raise IncompatibleError(
                f"labels={self.labels} are read off the last linear layer, and this model has none; take labels=known "
                "with a threat that shows them."
            )

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        alike: dict[Hashable, list[int]] = {}
        digests: dict[tuple[int, ...], str] = {}
        for i, observation in enumerate(observations):
            alike.setdefault(_kind(observation, digests), []).append(i)
        found: dict[int, Reconstruction] = {}
        for members in alike.values():
            rebuilt = self._reconstruct_group([observations[i] for i in members], victim, snapshots, digests)
            found |= zip(members, rebuilt, strict=True)
        return [found[i] for i in range(len(observations))]

    def _reconstruct_group(
        self, observations: list[Observation], victim: Victim, snapshots: Snapshots, digests: dict[tuple[int, ...], str]
    ) -> list[Reconstruction]:
        first = observations[0]
        victim = victim.to(next(iter(first.params.values())).device)
        material = Material.of(
            first, victim, num_examples=self.num_examples, holdout=self.holdout, projection=self.projection,
            scaled=self.standardized, renew=self.renew, chunk_size=self.chunk_size, seed=self.seed,
        )  # fmt: skip
        course = Course(
            hidden=self.hidden, num_layers=self.num_layers, epochs=self.epochs, batch_size=self.batch_size,
            learning_rate=self.learning_rate, decay_at=self.decay_at, decay=self.decay,
            standardized=self.standardized, snapshot_every=self.snapshot_every, seed=self.seed,
        )  # fmt: skip
        # repr holds every hyperparameter: a network of other settings or another model is never picked up
        place = (repr(self), repr(first.defense), repr(first.local), _digest(first, digests), repr(first.num_examples))
        inverter = train(material, course, snapshots, f"inverter-{derive(0, *place, *first.update):016x}")
        return [self._invert(o, victim, material, inverter) for o in observations]

    def _invert(
        self, observation: Observation, victim: Victim, material: Material, inverter: Inverter
    ) -> Reconstruction:
        labels = METHODS[self.labels](observation, victim)
        count, failure = observation.num_examples or 0, None
        if not all(bool(t.isfinite().all()) for t in observation.update.values()):
            failure = "the observed update holds NaN or infinity"
        elif inverter.error == float("inf"):
            failure = "the network's error was never finite; lower attack.learning_rate"
        like = next(iter(observation.params.values()))
        if failure is not None:
            blank = like.new_zeros(count, *victim.input_shape)
            return Reconstruction(inputs=blank, labels=labels, score=float("inf"), failure=failure)
        # one at a time, so that no rounding depends on the company
        features = material.sketch({k: v.detach().to(like)[None] for k, v in observation.update.items()})
        images = inverter(features, count)[0].view(count, *victim.input_shape)
        return Reconstruction(inputs=images, labels=labels, score=inverter.error)


def _kind(observation: Observation, digests: dict[tuple[int, ...], str]) -> tuple[Hashable, ...]:
    """What must be the same for observations to be inverted by one network."""
    o = observation
    return (
        _digest(o, digests), id(o.defense), id(o.local), id(o.public), o.num_examples, o.num_clients, *o.update,
    )  # fmt: skip


def _digest(observation: Observation, known: dict[tuple[int, ...], str]) -> str:
    """The values of all tensors of the broadcast; ``known``: by the tensors' identity, so that victims of one round,
    who hold the same ones, are read once."""
    parts: list[Mapping[str, Tensor]] = [observation.params, observation.buffers, observation.shared]
    tensors = [(k, v) for part in parts for k, v in part.items()]
    key = tuple(id(v) for _, v in tensors)
    if key not in known:
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in tensors:
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        known[key] = digest.hexdigest()
    return known[key]
