"""A variational bottleneck (Alemi et al. 2017) in front of a network's last linear layer, as PRECODE puts it there."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Penalised

NOISE = "noise"
"""The bottleneck's buffer for the standard normal numbers of one pass."""
LOWEST = -30.0
"""Below it, ln softplus(x) is x to 13 digits; computed directly, its second derivative would overflow."""


class Code(NamedTuple):
    """The decoded sample [B, features], and what it cost: the penalty [B], >= 0."""

    features: Tensor
    penalty: Tensor


@final
class VariationalBottleneck(nn.Module):
    """Features [B, d] are encoded as K normal distributions, of which one sample is decoded to features [B, d].

    (mu, s) = encoder(x), sigma = softplus(s), z = mu + sigma * noise, decoder(z). The penalty is
    beta / ln 2 * KL(N(mu, sigma^2) || N(0, 1)) of each example, in bits times beta (Scheliga et al. 2022).

    ``noise``: standard normal numbers [B, K], a buffer that whoever trains replaces for one pass
    (``functional_call``). The module draws none itself, because they would depend on how clients are batched. At rest
    it is empty, [0]: then z = mu, and nothing of it is averaged, sent or paid for.
    """

    noise: Tensor

    def __init__(self, num_features: int, *, latent_size: int, beta: float) -> None:
        super().__init__()
        self.latent_size, self.beta = latent_size, beta
        self.encoder = nn.Linear(num_features, 2 * latent_size)
        self.decoder = nn.Linear(latent_size, num_features)
        self.register_buffer(NOISE, torch.empty(0))

    def forward(self, x: Tensor) -> Code:
        mu, s = self.encoder(x).chunk(2, dim=-1)
        sigma = nn.functional.softplus(s)
        ln_sigma = torch.where(s < LOWEST, s, nn.functional.softplus(s.clamp(min=LOWEST)).log())
        nats = -0.5 * (1 + 2 * ln_sigma - mu.square() - sigma.square()).sum(-1)
        at_rest = self.noise.shape[-1] == 0
        z = mu if at_rest else mu + sigma * self.noise
        return Code(self.decoder(z), self.beta / math.log(2) * nats)


@final
class BottleneckedHead(nn.Module):
    """A linear layer behind a bottleneck. In this order, so that the last parameters are still the layer's."""

    def __init__(self, bottleneck: VariationalBottleneck, head: nn.Linear) -> None:
        super().__init__()
        self.bottleneck, self.head = bottleneck, head

    def forward(self, x: Tensor) -> Penalised:
        features, penalty = self.bottleneck(x)
        return Penalised(self.head(features), penalty)


def with_bottleneck(network: nn.Module, *, latent_size: int, beta: float) -> nn.Module:
    """A copy of ``network`` with a bottleneck before its last linear layer; the other parameters keep their values.

    Where that layer was ``fc``, there are now ``fc.bottleneck.encoder``, ``fc.bottleneck.decoder`` and ``fc.head``.
    Raises ``IncompatibleError`` for a network that does not end in a linear layer.
    """
    linear = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear or not _is_last(network, linear[-1][0]):
        raise no_head()
    path, head = linear[-1]
    bottleneck = VariationalBottleneck(head.in_features, latent_size=latent_size, beta=beta).to(head.weight)
    if not path:
        return BottleneckedHead(bottleneck, copy.deepcopy(head))
    changed = copy.deepcopy(network)
    changed.set_submodule(path, BottleneckedHead(bottleneck, copy.deepcopy(head)))
    return changed


def no_head() -> IncompatibleError:
    """For a model without a place for the bottleneck."""
    return IncompatibleError(
        "defense precode puts its bottleneck before the last linear layer, and the model does not end in one with one "
        "output per class; choose a model that does (lenet, convnet64, resnet18)."
    )


def _is_last(network: nn.Module, path: str) -> bool:
    """Whether no layer follows in the sequences that ``path`` lies in; what other modules do is not known here."""
    whole: OrderedDict[str, nn.Module] = OrderedDict(network.named_modules())
    names = path.split(".") if path else []
    for depth, name in enumerate(names):
        parent = whole[".".join(names[:depth])]
        if isinstance(parent, nn.Sequential) and list(parent._modules)[-1] != name:
            return False
    return True
