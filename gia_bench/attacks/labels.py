"""What the attacker takes the labels to be: shown, read off the update, or searched together with the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from gia_bench.attacks.label_inference import bias_corrected, bias_gradient, gradinversion, idlg, ilrg, llg
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.values import Observation

Labels: TypeAlias = Callable[[Observation, Victim], Tensor | None]
"""(observation with num_examples=B, victim) -> labels [B] int64, or None to search them together with the images."""


def known(observation: Observation, victim: Victim) -> Tensor:
    """The labels that the threat model shows."""
    if observation.labels is None:
        raise IncompatibleError(
            "labels=known: this threat model does not show the labels; take threat=curious_server_labels, or "
            "labels=auto to read them off the update."
        )
    return observation.labels


def joint(observation: Observation, victim: Victim) -> None:
    """None: the labels are variables of the search (Zhu et al. 2019, DLG)."""


def auto(observation: Observation, victim: Victim) -> Tensor:
    """The labels where they are shown; else those of ``bias_corrected`` for one example, of ``ilrg`` for more.

    For one example ``bias_corrected`` is certain. For more the choice is by measurement (docs/results/labels.md,
    CIFAR-10): of 2 to 64 examples ``ilrg`` finds 97 to 100 % of a LeNet's labels, and ``bias_corrected`` down to 53 %,
    less than a random guess. A trained ResNet-20 in training mode is the exception: there ``bias_corrected`` finds
    more, and neither beats a guess from 16 examples on. Where the update does not show what ``ilrg`` reads,
    ``bias_corrected`` is taken.
    """
    if observation.labels is not None:
        return observation.labels
    head, update = victim.head, observation.update
    counts = observation.num_examples != 1 and head is not None and head.weight in update and head.bias in update
    return (ilrg if counts else bias_corrected)(observation, victim)


METHODS: Mapping[str, Labels] = {
    f.__name__: f for f in (auto, known, joint, idlg, bias_gradient, bias_corrected, llg, ilrg, gradinversion)
}
"""What can be chosen as ``labels``."""


def accuracy(found: Tensor, truth: Tensor) -> float:
    """The share of the labels truth [B] that were found, in any order, each as often as it occurs; in [0, 1]."""
    hits = Counter(found.tolist()) & Counter(truth.tolist())
    return hits.total() / len(truth)
