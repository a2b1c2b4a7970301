"""A network as a chain of linear maps and activations that can be undone, and each map's input from its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.values import Params


class Undo(NamedTuple):
    """An activation seen from its output: its input, and its derivative there."""

    inverse: Callable[[nn.Module, Tensor], Tensor]
    slope: Callable[[nn.Module, Tensor], Tensor]


def _leaky_factor(module: nn.Module, out: Tensor) -> Tensor:
    assert isinstance(module, nn.LeakyReLU)
    return torch.where(out < 0, module.negative_slope, 1.0).to(out)


INVERTIBLE: dict[type[nn.Module], Undo] = {
    nn.LeakyReLU: Undo(lambda m, h: h / _leaky_factor(m, h), _leaky_factor),
    nn.Sigmoid: Undo(lambda m, h: h.logit(eps=1e-12), lambda m, h: h * (1 - h)),
    nn.Tanh: Undo(lambda m, h: h.clamp(-1 + 1e-12, 1 - 1e-12).atanh(), lambda m, h: 1 - h.square()),
}


@final
@dataclass(frozen=True, eq=False)
class Link:
    """A convolution or linear layer, and the activations after it. in_shape: of one input, without the batch axis."""

    name: str
    layer: nn.Conv2d | nn.Linear
    in_shape: tuple[int, ...]
    activations: tuple[nn.Module, ...]

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def bias(self) -> str | None:
        """The name of its bias, if it has one."""
        return None if self.layer.bias is None else self.weight.removesuffix("weight") + "bias"

    def undo(self, out: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """From the activations' output and the loss's gradient there to the same before them."""
        for part in reversed(self.activations):
            known = INVERTIBLE[type(part)]
            out, gradient = known.inverse(part, out), gradient * known.slope(part, out)
        return out, gradient

    def matrix(self, params: Params) -> Tensor:
        """The layer without its bias as a matrix [outputs, inputs]."""
        weight = params[self.weight]
        if isinstance(self.layer, nn.Linear):
            return weight
        each = torch.eye(torch.Size(self.in_shape).numel(), dtype=weight.dtype).view(-1, *self.in_shape)
        layer = self.layer
        made = nn.functional.conv2d(each, weight, None, layer.stride, layer.padding, layer.dilation)
        return made.flatten(1).T

    def equations(
        self, params: Params, out: Tensor, slopes: Tensor, weight_gradient: Tensor, balanced: bool
    ) -> tuple[Tensor, Tensor]:
        """A [equations, inputs] and b with A @ input = b: what the layer makes of it, then its weight's gradient.

        out: the layer's outputs; slopes: the loss's gradient there. The gradient's equations are first turned into the
        fewest with the same least-squares solutions. balanced: both kinds are brought to the same mean square.
        """
        matrix, values = self.matrix(params), out.flatten()
        if self.bias is not None:
            values = (out.view(len(params[self.bias]), -1) - params[self.bias][:, None]).flatten()
        coefficients, right = self.gradient_equations(slopes, weight_gradient)
        if coefficients.shape[0] > coefficients.shape[1]:
            rotation, coefficients = torch.linalg.qr(coefficients)
            right = rotation.T @ right
        per_channel = torch.kron(torch.eye(right.shape[1], dtype=right.dtype), coefficients.contiguous())
        blocks = [(matrix, values), (per_channel, right.T.flatten())]
        if balanced:
            scales = [a.norm().clamp(min=torch.finfo(a.dtype).tiny) for a, _ in blocks]
            blocks = [(a / scale, b / scale) for (a, b), scale in zip(blocks, scales, strict=True)]
        return torch.cat([a for a, _ in blocks]), torch.cat([b for _, b in blocks])

    def gradient_equations(self, slopes: Tensor, weight_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The weight's gradient is linear in the input, channel by channel with the same coefficients.

        slopes: the loss's gradient for the layer's outputs, flat. Returns coefficients [m, n] and right sides [m, C]:
        coefficients @ input[c] = right[:, c]: n pixels and C channels; for a linear layer n = 1 and C inputs.
        """
        if isinstance(self.layer, nn.Linear):
            return slopes[:, None], weight_gradient
        outputs = weight_gradient.shape[0]
        pixels = torch.Size(self.in_shape[1:]).numel()
        each = torch.eye(pixels, dtype=slopes.dtype).view(pixels, 1, *self.in_shape[1:])
        layer = self.layer
        # [pixels, positions in the kernel, places of the kernel]; padding is 0 and so needs no unknowns of its own
        seen = nn.functional.unfold(each, layer.kernel_size, layer.dilation, _pair(layer.padding), layer.stride)
        coefficients = torch.einsum("ol,pkl->okp", slopes.view(outputs, -1), seen).flatten(0, 1)
        return coefficients, weight_gradient.flatten(2).transpose(1, 2).flatten(0, 1)


def links(victim: Victim) -> list[Link]:
    """The chain from image to scores. Raises ``IncompatibleError`` for a model that is none, naming the part."""
    found: list[Link] = []
    probe = next(victim.module.parameters()).detach()
    x = torch.zeros(1, *victim.input_shape, dtype=probe.dtype, device=probe.device)
    with torch.no_grad():
        for name, part in _parts("", victim.module):
            if isinstance(part, nn.Linear | nn.Conv2d):
                _check_layer(name, part, x)
                found.append(Link(name, part, tuple(x.shape[1:]), ()))
            elif _can_be_undone(part) and found:
                last = found.pop()
                found.append(Link(last.name, last.layer, last.in_shape, (*last.activations, part)))
            elif not isinstance(part, nn.Flatten | nn.Identity):
                raise _refusal(name, part)
            x = part(x)
    if not found or not isinstance(found[-1].layer, nn.Linear) or found[-1].activations:
        raise IncompatibleError("R-GAP needs a model that ends with a linear layer; take model=cnn6.")
    return found


def _parts(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(part, nn.Sequential):
        yield name, part
        return
    for child, inner in part.named_children():
        yield from _parts(f"{name}.{child}" if name else child, inner)


def _can_be_undone(part: nn.Module) -> bool:
    # a slope of 0 is a ReLU, and a negative one gives two inputs for one output
    return type(part) in INVERTIBLE and not (isinstance(part, nn.LeakyReLU) and part.negative_slope <= 0)


def _check_layer(name: str, layer: nn.Module, x: Tensor) -> None:
    plain = not isinstance(layer, nn.Conv2d) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )
    if not plain or (isinstance(layer, nn.Linear) and x.dim() != 2):
        raise _refusal(name, layer)


def _refusal(name: str, part: nn.Module) -> IncompatibleError:
    known = ", ".join(sorted(kind.__name__ for kind in INVERTIBLE))
    called = f"{type(part).__name__} {name!r}" if name else f"a whole {type(part).__name__}"
    return IncompatibleError(
        f"R-GAP goes back through plain convolutions (groups=1, zero padding), linear layers and activations that can "
        f"be undone ({known}), one after the other, and cannot go through {called}; take model=cnn6."
    )


def _pair(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    assert not isinstance(padding, str)  # ``_check_layer`` refused it
    return padding
