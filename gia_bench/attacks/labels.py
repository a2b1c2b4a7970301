"""What the attacker takes the labels to be: shown, read off the update, or searched together with the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

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
            "labels=bias_corrected to read them off the update."
        )
    return observation.labels


def joint(observation: Observation, victim: Victim) -> None:
    """None: the labels are variables of the search (Zhu et al. 2019, DLG)."""


def auto(observation: Observation, victim: Victim) -> Tensor:
    """The labels where they are shown, else ``bias_corrected``."""
    return observation.labels if observation.labels is not None else bias_corrected(observation, victim)


def idlg(observation: Observation, victim: Victim) -> Tensor:
    """The class whose row of the last layer's weight gradient has the smallest sum, for one example (Zhao et al. 2020).

    Certain where the last layer's inputs are not negative. Raises ``IncompatibleError`` for more than one example.
    """
    if observation.num_examples != 1:
        raise IncompatibleError(
            f"labels=idlg reads one label and this update holds {observation.num_examples} examples; "
            "take labels=bias_corrected or labels=joint, or train with one example per client and round."
        )
    return _weight_rows(observation, victim).argmin().view(1)


def bias_corrected(observation: Observation, victim: Victim) -> Tensor:
    """Labels of a batch, repeated ones too, read off the last bias's gradient (breaching, after Wainakh et al. 2021).

    Every class with a negative entry is taken once (the most negative first); then, until there are B, the most
    negative one again, each label raising its entry by the mean share of a label. Without a bias the row sums of the
    weight are read instead, whose signs mean the same where the layer's inputs are not negative. In ascending order.
    """
    head = victim.head
    count = observation.num_examples or 0
    if head is not None and head.bias is not None and head.bias in observation.update:
        signal = observation.update[head.bias]
    else:
        signal = _weight_rows(observation, victim)
    signal = signal.detach().to("cpu", torch.float64, copy=True)
    found = [int(c) for c in signal.argsort() if signal[c] < 0][:count]
    share = signal[found].sum() / count
    signal[found] -= share
    while len(found) < count:
        found.append(int(signal.argmin()))
        signal[found[-1]] -= share
    return torch.tensor(sorted(found), device=next(iter(observation.update.values())).device)


def _weight_rows(observation: Observation, victim: Victim) -> Tensor:
    if victim.head is None or victim.head.weight not in observation.update:
        raise IncompatibleError(
            "Labels cannot be read off this update: it shows no last linear layer with one row per class; "
            "take labels=joint, or threat=curious_server_labels."
        )
    return observation.update[victim.head.weight].sum(1)


METHODS: Mapping[str, Labels] = {f.__name__: f for f in (auto, known, idlg, bias_corrected, joint)}
"""What can be chosen as ``labels``."""
