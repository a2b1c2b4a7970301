"""Whether a network gives its input away at all: equations against unknowns, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.beginnings import hypotheses
from gia_bench.attacks.chain import Link, links
from gia_bench.attacks.least_squares import numerical_rank
from gia_bench.attacks.unexplained import on_host
from gia_bench.models.functional import Victim
from gia_bench.values import Params


@final
@dataclass(frozen=True, kw_only=True)
class LayerRank:
    """unknowns: numbers in the layer's input; output_equations: what its output says about them; gradient_equations:
    what its weight's gradient says, before doubles are taken out; rank: how many of all these are independent.
    """

    name: str
    unknowns: int
    output_equations: int
    gradient_equations: int
    rank: int

    @property
    def determined(self) -> bool:
        """Whether there is one input only, given the layers behind."""
        return self.rank == self.unknowns


def rank_analysis(victim: Victim, params: Params, image: Tensor, *, precision: float = 1e-10) -> list[LayerRank]:
    """Every layer but the last, from the image to the scores, where the image is ``image`` [C, H, W] in [0, 1].

    In the spirit of the paper's rank analysis, with ranks counted numerically instead of its index (gia_bench choice).
    They depend on the image only through the loss's gradient at the layers, so one says what holds for nearly all.
    precision: of the equations brought to one size,
    singular values below it times the largest are 0 (1e-7: what float32 updates show). Costs a singular value
    decomposition per layer. Raises ``IncompatibleError`` like ``RGAP.check_victim``.
    """
    chain, params = links(victim), on_host(params)
    inputs, slopes, gradients = _inside(victim, chain, params, image.detach().to("cpu", torch.float64))
    made: list[LayerRank] = []
    for link, out, at_output, gradient in zip(chain[:-1], inputs, slopes, gradients, strict=False):
        equations, _ = link.equations(params, out, at_output, gradient, balanced=True)
        made.append(
            LayerRank(
                name=link.name,
                unknowns=equations.shape[1],
                output_equations=out.numel(),
                gradient_equations=gradient.numel(),
                rank=numerical_rank(equations, precision),
            )
        )
    return made


def _inside(
    victim: Victim, chain: list[Link], params: Params, image: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Every layer's outputs, the loss's gradient there, and its weight's gradient."""
    weights = {link.weight: params[link.weight].clone().requires_grad_() for link in chain}
    if victim.mean is not None and victim.std is not None:
        image = (image - victim.mean.cpu().view(-1, 1, 1)) / victim.std.cpu().view(-1, 1, 1)
    outputs: list[Tensor] = []
    x = image
    for link in chain:
        own = {"weight": weights[link.weight]}
        if link.bias is not None:
            own["bias"] = params[link.bias]
        outputs.append(torch.func.functional_call(link.layer, own, (x.view(1, *link.in_shape),)))
        x = outputs[-1]
        for activation in link.activations:
            x = activation(x)
    loss = victim.loss(x, hypotheses(victim.num_classes)[:1]).sum()
    found = torch.autograd.grad(loss, [*outputs, *weights.values()])
    flat = [slope[0].flatten() for slope in found[: len(chain)]]
    return [out.detach()[0].flatten() for out in outputs], flat, list(found[len(chain) :])
