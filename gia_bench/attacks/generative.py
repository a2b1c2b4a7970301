"""What the attacks with a generator share: they search among the images that it makes, and match gradients."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gia_bench.attacks.adaptive import Constraint
from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.distances import Distance
from gia_bench.attacks.group import STEPS, Group
from gia_bench.attacks.labels import METHODS
from gia_bench.attacks.latent_priors import LatentPrior
from gia_bench.attacks.latents import Generator, GeneratorSource, LatentGroup, check_generator, from_latents
from gia_bench.attacks.matching import alike, kind, why_never_finite
from gia_bench.attacks.priors import Prior
from gia_bench.attacks.replay import Replay
from gia_bench.attacks.scene import PixelSpace
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.seeding import derive
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Reconstruction


class Found(NamedTuple):
    """What a search ends with. images: [V, T, B, C, H, W] in [0, 1]; loss: [V, T], infinite: never finite; diverged:
    [V, T] bool, candidates that left the numbers (None: nothing follows a gradient)."""

    images: Tensor
    loss: Tensor
    diverged: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Generative(Attack):
    """Minimise distance(dummy update, observed update) + priors over what a generator can make.

    generator: where it comes from; distance, priors, constraints, replay, labels, restarts, max_batch, arithmetic: as
    in ``GradientMatching``, but labels are never searched, and ``arithmetic`` is that of the matching, the generator's
    own is fp32; latent_priors: penalties on the latents; snapshot_every: steps
    between two snapshots. The update that an attacker who knows the defense observed is matched through
    ``defense.surrogate``. The restart with the lowest loss is returned; the truth is nowhere near.
    """

    generator: GeneratorSource
    distance: Distance
    priors: Mapping[str, Prior] = field(default_factory=dict)
    constraints: Mapping[str, Constraint] = field(default_factory=dict)
    latent_priors: Mapping[str, LatentPrior] = field(default_factory=dict)
    replay: Replay = STEPS
    labels: str = "auto"
    restarts: int = 1
    max_batch: int | str | None = None
    arithmetic: Arithmetic = PLAIN
    snapshot_every: int = 100

    def __post_init__(self) -> None:
        for name in ("priors", "constraints", "latent_priors"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        for name in ("restarts", "snapshot_every"):
            check(getattr(self, name) >= 1, f"attack.{name}", getattr(self, name), "at least 1")
        fine = self.max_batch >= 1 if isinstance(self.max_batch, int) else self.max_batch in (None, "auto")
        check(fine, "attack.max_batch", self.max_batch, "at least 1, or null, or auto")
        if self.labels not in METHODS or self.labels == "joint":
            raise ConfigError(choices("attack.labels", self.labels, METHODS.keys() - {"joint"}))

    @abstractmethod
    def search(self, group: LatentGroup, snapshots: Snapshots, key: str) -> Found:
        """The best image of every candidate [V, T]. key: names the state of these victims under these settings."""

    def check_generator(self, generator: Generator) -> None:
        """Raises ``IncompatibleError`` for a generator that this attack cannot search."""

    @property
    def requires(self) -> Knowledge:
        shown = Knowledge.LABELS if self.labels == "known" else Knowledge.NONE
        return reduce(or_, (prior.requires for prior in self.priors.values()), Knowledge.NUM_EXAMPLES | shown)

    def check_victim(self, victim: Victim) -> None:
        """There must be a generator of images that the model takes, and a linear layer to read labels from."""
        self._loaded(victim)
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
        generator = self._loaded(victim)
        found: dict[int, Reconstruction] = {}
        for members in alike(observations, victim, self.priors):
            some, own = [observations[i] for i in members], [seeds[i] for i in members]
            found |= zip(members, self._reconstruct_group(some, victim, generator, own, snapshots), strict=True)
        return [found[i] for i in range(len(observations))]

    def _loaded(self, victim: Victim) -> Generator:
        generator = self.generator.load()
        refusal = check_generator(generator, victim)
        if refusal is not None:
            raise IncompatibleError(f"attack.generator: {refusal}")
        self.check_generator(generator)
        return generator

    def _reconstruct_group(
        self,
        observations: list[Observation],
        victim: Victim,
        generator: Generator,
        seeds: list[int],
        snapshots: Snapshots,
    ) -> list[Reconstruction]:
        like, first = next(iter(observations[0].params.values())).detach(), observations[0]
        victim, space = victim.to(like.device), PixelSpace.of(victim, like)
        labels = [self._labels(o, victim, s) for o, s in zip(observations, seeds, strict=True)]
        B = (first.num_examples or 0) * self.replay.copies(first)
        group = Group.of(
            observations, victim, labels, space, self.distance, self.priors,
            self.max_batch if isinstance(self.max_batch, int) else None, self.constraints, self.replay,
        )  # fmt: skip
        if self.max_batch == "auto":
            group = group.fitted({"pixels": like.new_zeros(len(seeds), self.restarts, B, *victim.input_shape)})
        classes = nn.functional.one_hot(group.seen.labels["labels"], victim.num_classes).to(like)
        latent = LatentGroup(
            group=group, generator=generator.like(like), classes=classes, seeds=seeds, restarts=self.restarts, batch=B,
            penalties=self.latent_priors,
        )  # fmt: skip
        guesses = latent.images(from_latents(latent.generator), {"latents": latent.latents()})
        group = group.computed(self.arithmetic, {"pixels": space.encode(guesses)})
        latent = dataclasses.replace(latent, group=group)
        # the state of other settings, another generator or other victims is never picked up
        place = derive(0, repr(self), generator.fingerprint, repr(kind(first)[-1]), *seeds)
        found = self.search(latent, snapshots, f"{type(self).__name__.lower()}-{place:016x}")
        pixels = space.encode(found.images)
        rebuilt = [
            self._best_restart(pixels[v], found.loss[v], o, labels[v], space) for v, o in enumerate(observations)
        ]
        if found.diverged is None:
            return rebuilt
        counts = found.diverged.sum(1).tolist()
        return [dataclasses.replace(one, diverged=count) for one, count in zip(rebuilt, counts, strict=True)]

    def _labels(self, observation: Observation, victim: Victim, seed: int) -> Tensor:
        """[T or 1, B] as the replay takes them."""
        found = METHODS[self.labels](observation, victim)
        assert found is not None  # "joint" was refused
        return self.replay.arrange(found, observation, seed, self.restarts)

    def _best_restart(
        self, pixels: Tensor, loss: Tensor, observation: Observation, labels: Tensor, space: PixelSpace
    ) -> Reconstruction:
        t = int(loss.argmin())
        image, own = self.replay.merge(pixels[t], labels[min(t, len(labels) - 1)], observation)
        score = float(loss[t])
        return Reconstruction(
            inputs=space.decode(image),
            labels=own,
            score=score,
            failure=None if score < torch.inf else why_never_finite(observation, self.restarts),
        )


def best_of(first: Found, *later: Found) -> Found:
    """Of every candidate the images with the lowest loss, the earlier ones where losses are equal; it diverged where it
    did in any of the searches."""
    best = first
    for found in later:
        better = found.loss < best.loss
        images = torch.where(better.view(*better.shape, *[1] * (found.images.ndim - 2)), found.images, best.images)
        both = [f.diverged for f in (best, found) if f.diverged is not None]
        diverged = torch.stack(both).any(0) if both else None
        best = Found(images, torch.where(better, found.loss, best.loss), diverged)
    return best
