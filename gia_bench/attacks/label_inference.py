"""Labels read off an update, without the images: each method is a function of what the attacker sees.

With softmax and cross-entropy, the gradient of the last bias is mean(p) - counts / B: what the model predicts minus
what the labels are. The rows of the last weight hold the same, weighted by the layer's inputs. All return labels [B]
int64 in ascending order, for the order of a batch cannot be known. ``Observation.num_examples`` must be shown.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gia_bench.attacks.scene import update_unit
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.values import Observation


def idlg(observation: Observation, victim: Victim) -> Tensor:
    """The class whose row of the last layer's weight gradient has the smallest sum, for one example (Zhao et al. 2020).

    Certain where the last layer's inputs are not negative. Raises ``IncompatibleError`` for more than one example.
    """
    if observation.num_examples != 1:
        raise IncompatibleError(
            f"labels=idlg reads one label and this update holds {observation.num_examples} examples; "
            "take labels=bias_corrected or labels=joint, or train with one example per client and round."
        )
    return _weight(observation, victim).sum(1).argmin().view(1)


def bias_gradient(observation: Observation, victim: Victim) -> Tensor:
    """The classes whose entry of the last bias's gradient is negative: only a label in the batch can make it so.

    Certain for one example, whatever the activations. A class that is present can stay positive where the model expects
    it more often than it occurs. With fewer negative classes than examples the same ones are taken again in turn, the
    most negative first: this method does not count; ``bias_corrected`` and ``ilrg`` do.
    """
    signal = _on_host(_bias(observation, victim))
    count = observation.num_examples or 0
    present = _negative(signal)[:count] or [int(signal.argmin())]
    return _as_labels([present[i % len(present)] for i in range(count)], observation)


def bias_corrected(observation: Observation, victim: Victim) -> Tensor:
    """Labels of a batch, repeated ones too, read off the last bias's gradient (breaching, after Wainakh et al. 2021).

    Every class with a negative entry is taken once (the most negative first); then, until there are B, the most
    negative one again, each label raising its entry by the mean share of a label. Without a bias the row sums of the
    weight are read instead, whose signs mean the same where the layer's inputs are not negative.
    """
    head = victim.head
    if head is not None and head.bias is not None and head.bias in observation.update:
        signal = observation.update[head.bias]
    else:
        signal = _weight(observation, victim).sum(1)
    signal, count = _on_host(signal), observation.num_examples or 0
    found = _negative(signal)[:count]
    return _as_labels(_count_down(signal, found, signal[found].sum() / count, count), observation)


def llg(observation: Observation, victim: Victim) -> Tensor:
    """Counts from the row sums of the last weight (Wainakh et al. 2021, LLG, which sees nothing but the update).

    One label changes its row by the impact m = (1 + 1 / classes) / B * the sum of the negative rows. Negative rows are
    present once; then the most negative row is taken, and m taken off it, until there are B. For layer inputs that are
    not negative. The variants that measure m on other data (LLG*, LLG+) are not here.
    """
    signal, count = _on_host(_weight(observation, victim).sum(1)), observation.num_examples or 0
    impact = (1 + 1 / len(signal)) * signal.clamp(max=0).sum() / count
    return _as_labels(_count_down(signal, _negative(signal)[:count], impact, count), observation)


def gradinversion(observation: Observation, victim: Victim) -> Tensor:
    """The B classes whose rows of the last weight's gradient have the smallest minima (Yin et al. 2021).

    Takes every label at most once, as the paper does. Raises ``IncompatibleError`` for more examples than classes.
    """
    rows, count = _weight(observation, victim), observation.num_examples or 0
    if count > len(rows):
        raise IncompatibleError(
            f"labels=gradinversion takes no label twice, and this update holds {count} examples of {len(rows)} "
            "classes; take labels=bias_corrected, labels=llg or labels=ilrg."
        )
    return _as_labels(_on_host(rows.amin(1)).argsort()[:count].tolist(), observation)


def ilrg(observation: Observation, victim: Victim) -> Tensor:
    """Counts that explain the last bias's gradient, given what the model predicts for each class (Ma et al. 2023).

    The mean input of the last layer for class j is taken to be its weight gradient's row over its bias gradient's
    entry; its predictions p_j follow. Counts k solve sum k = B and sum_j k_j p_j - k = B * the bias's gradient by least
    squares. Negative ones become 0, all are rounded, and those rounded most are changed until they sum to B.
    """
    weight, bias = _on_host(_weight(observation, victim)), _on_host(_bias(observation, victim))
    head, count, unit = victim.head, observation.num_examples or 0, update_unit(observation)
    assert head is not None and head.bias is not None
    # a class whose entries were pruned has no embedding; zeros make the prediction of the bias alone
    embeddings = torch.where(bias != 0, 1 / bias, 0.0)[:, None] * weight
    own_weight, own_bias = (_on_host(observation.params[k]) for k in (head.weight, head.bias))
    predictions = (embeddings @ own_weight.T + own_bias).softmax(1)
    equations = torch.cat([torch.ones_like(bias)[None], predictions.T - torch.eye(len(bias), dtype=bias.dtype)])
    values = torch.cat([bias.new_tensor([count]), count * bias / unit])
    counts = torch.linalg.lstsq(equations, values, driver="gelsd").solution.clamp(min=0)
    whole = counts.round()
    while int(whole.sum()) != count:
        step = 1 if int(whole.sum()) < count else -1
        gain = step * (counts - whole)
        if step < 0:
            gain[whole == 0] = -torch.inf
        whole[gain.argmax()] += step
    return _as_labels(torch.arange(len(whole)).repeat_interleave(whole.long()).tolist(), observation)


def _count_down(signal: Tensor, present: list[int], impact: Tensor, count: int) -> list[int]:
    """``present``, then always the most negative class, each label taking its impact (negative) off its class."""
    found, signal = list(present), signal.clone()
    signal[found] -= impact
    while len(found) < count:
        found.append(int(signal.argmin()))
        signal[found[-1]] -= impact
    return found


def _negative(signal: Tensor) -> list[int]:
    return [int(c) for c in signal.argsort() if signal[c] < 0]


def _on_host(tensor: Tensor) -> Tensor:
    # NaN and infinity are nothing here: the attack itself finds them, and fails that victim with a reason
    return tensor.detach().to("cpu", torch.float64).nan_to_num(0.0, 0.0, 0.0)


def _as_labels(found: list[int], observation: Observation) -> Tensor:
    return torch.tensor(sorted(found), device=next(iter(observation.update.values())).device)


def _weight(observation: Observation, victim: Victim) -> Tensor:
    if victim.head is None or victim.head.weight not in observation.update:
        raise IncompatibleError(
            "Labels cannot be read off this update: it shows no last linear layer with one row per class; "
            "take labels=joint, or threat=curious_server_labels."
        )
    return observation.update[victim.head.weight]


def _bias(observation: Observation, victim: Victim) -> Tensor:
    if victim.head is None or victim.head.bias is None or victim.head.bias not in observation.update:
        raise IncompatibleError(
            "This way to read labels needs the last linear layer's bias, which this update does not show; "
            "take labels=bias_corrected or labels=llg, which read the weight alone."
        )
    return observation.update[victim.head.bias]
