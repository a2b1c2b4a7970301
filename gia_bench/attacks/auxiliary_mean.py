"""What an attacker says who has auxiliary images and has not looked at the update: the control of learned attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Reconstruction

CHUNK = 1024


@final
@dataclass(frozen=True, kw_only=True)
class AuxiliaryMean(Attack):
    """The mean of the auxiliary images, for every example of every update; the label is the most frequent one.

    Of all constant answers it has the smallest mean squared error over the auxiliary images, so that a learned inverter
    that is no better has learned nothing from the update. The score is that error. gia_bench's own.
    """

    @property
    def requires(self) -> Knowledge:
        return Knowledge.NUM_EXAMPLES | Knowledge.PUBLIC

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        means: dict[int, Reconstruction] = {}
        for observation in observations:
            if id(observation.public) not in means:
                means[id(observation.public)] = _mean(observation)
        return [_repeated(means[id(o.public)], o) for o in observations]


def _mean(observation: Observation) -> Reconstruction:
    """Of all auxiliary examples, as one image [1, C, H, W]."""
    public = observation.public
    if public is None:
        raise IncompatibleError(
            "The mean of auxiliary images needs auxiliary images; take threat=curious_server_public."
        )
    total, squares = torch.zeros((), dtype=torch.float64), 0.0
    for start in range(0, len(public), CHUNK):
        images = public.images(torch.arange(start, min(start + CHUNK, len(public)))).double()
        total, squares = total + images.sum(0), squares + float(images.square().sum())
    mean = total / len(public)
    error = squares / (len(public) * mean.numel()) - float(mean.square().mean())
    label = public.labels.bincount().argmax()
    return Reconstruction(inputs=mean[None], labels=label[None], score=error)


def _repeated(mean: Reconstruction, observation: Observation) -> Reconstruction:
    count, like = observation.num_examples or 0, next(iter(observation.params.values()))
    assert mean.labels is not None
    return Reconstruction(
        inputs=mean.inputs.to(like).repeat(count, 1, 1, 1),
        labels=mean.labels.to(like.device).repeat(count),
        score=mean.score,
    )
