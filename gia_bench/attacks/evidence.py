"""How improbable a reconstruction is, by what an attacker sees and by nothing else.

Minus the log of a density, in nats, up to a constant that is the same for all reconstructions of an update: how badly
it explains what was observed, and how unlike an image it is. Where the update says much the first decides; where it
says little, many images explain it, and the second does: it is least for an even grey, and so is their sum for an
update that says nothing.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from gia_bench.attacks.distances import Cosine, Distance
from gia_bench.attacks.labels import auto
from gia_bench.attacks.replay import LocalSteps, Replay
from gia_bench.attacks.scene import Scene
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Observation, Reconstruction, Update

COSINE, STEPS = Cosine(), LocalSteps()

ROUGHNESS = 0.06
"""How much neighbouring pixels of images in [0, 1] differ in the mean: 0.049 in photographs of 64 x 64 pixels
(ImageNet), 0.057 in CIFAR-10, 0.067 in MNIST, 0.078 in Fashion-MNIST, each over training images."""

EXACT = 1e-7
"""A cosine distance below which single precision tells no two updates apart."""


@torch.no_grad()
def improbability(rebuilt: Reconstruction, observation: Observation, victim: Victim) -> float:
    """The nats of what was observed, given the reconstruction, and those of its images; infinite where there are none.

    Observed, of n entries that are not zero: by the law of noise or rounding where the defense is known to have one; of
    signs, n times the entropy of the share that is wrong, as if each were turned by chance; of numbers, n / 2 times the
    log of the cosine distance, as if they were off by Gaussian noise of unknown size.
    Images: neighbours differ by a Laplace law whose mean is ``ROUGHNESS``, which counts once for every pixel.
    """
    sent = explanation(rebuilt, observation, victim)
    if sent is None:
        return math.inf
    return (_unexplained(sent, observation) + _unlike_an_image(rebuilt.inputs)).nan_to_num(math.inf, math.inf).item()


@torch.no_grad()
def misfit(
    rebuilt: Reconstruction,
    observation: Observation,
    victim: Victim,
    distance: Distance = COSINE,
    replay: Replay = STEPS,
) -> float:
    """How far the update that a reconstruction stands for is from the observed one; infinite where there is none."""
    sent = explanation(rebuilt, observation, victim, replay)
    if sent is None:
        return math.inf
    return distance(sent, observation.update).nan_to_num(math.inf, math.inf).item()


def explanation(
    rebuilt: Reconstruction, observation: Observation, victim: Victim, replay: Replay = STEPS
) -> Update | None:
    """The update that the server would have seen of these images (clamped to [0, 1]), through the defense's stand-in
    where it is known; None for a reconstruction that failed, or has no labels."""
    if rebuilt.failure is not None or not bool(rebuilt.inputs.isfinite().all()):
        return None
    like = next(iter(observation.params.values()))
    victim, images = victim.to(like.device), rebuilt.inputs.to(like).clamp(0, 1)
    try:
        labels = rebuilt.labels if rebuilt.labels is not None else auto(observation, victim)
    except IncompatibleError:  # there is no linear layer to read them off
        return None
    buffers = {k: v.to(like.device) for k, v in {**victim.initial()[1], **observation.buffers}.items()}
    seen = dataclasses.replace(observation, buffers=buffers)
    update = replay.update(Batch(images, labels.to(like.device), images.new_ones(len(images))), Scene(victim, seen))
    return update if observation.defense is None else observation.defense.surrogate(update, observation)


def _unexplained(sent: Update, observation: Observation) -> Tensor:
    observed = observation.update
    law = None if observation.defense is None else observation.defense.noise_law(observation)
    if law is not None:
        return law.surprise(sent, observed).double()
    count = sum(int((u != 0).sum()) for u in observed.values())
    if _signs(observed):
        # SignSGD sends 0 as +, and of an attacker who does not know it the dummy may hold many
        wrong = sum(int(((u != 0) & ((sent[k] < 0) != (u < 0))).sum()) for k, u in observed.items())
        share = torch.tensor(min(wrong / count, 0.5), dtype=torch.float64)  # worse than chance is no better than chance
        entropy: Tensor = torch.special.entr(share) + torch.special.entr(1 - share)
        return count * entropy
    away = COSINE(sent, observed).double()
    return count / 2 * away.clamp(min=EXACT).log()


def _signs(update: Update) -> bool:
    """Whether every tensor is a sign and one magnitude for all its entries; entries that are zero were not sent."""
    sizes = [u.abs()[u != 0] for u in update.values()]
    return all(bool((s == s[:1]).all()) for s in sizes) and any(len(s) > 1 for s in sizes)


def _unlike_an_image(inputs: Tensor) -> Tensor:
    """inputs: [B, C, H, W], clamped to [0, 1] here."""
    images = inputs.double().clamp(0, 1)
    away = torch.cat([images.diff(dim=d).abs().flatten() for d in (-2, -1)])
    return images.numel() / ROUGHNESS * away.sum() / max(len(away), 1)
