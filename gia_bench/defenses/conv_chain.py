"""Lengths of the Jacobian's rows of plain convolutional nets, without one backward pass per feature.

A chain of convolutions with elementwise activations has the Jacobian D_L W_L ... D_1 W_1, and only the diagonals D
depend on the example. It is cut behind the second convolution: J = U V. Both factors are local, so they are computed
as windows; the length of row f is (u_f V V' u_f)^(1/2), and V V' is banded. For LeNet that is half the multiplications
of backpropagation, in matrix products instead of strided transposed convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias, final

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn.functional import conv2d, pad

from gia_bench.models.functional import Head, Victim
from gia_bench.values import Params

Stage: TypeAlias = tuple[str, nn.Conv2d, nn.Module | None]
"""The convolution's name, itself, and the activation after it."""

ELEMENTWISE = (nn.Sigmoid, nn.ReLU, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.GELU, nn.SiLU, nn.Identity)
MOST_CUT = 4096
"""Units at the cut beyond which V V' would not fit the caches, nor soon the memory."""


@final
@dataclass(frozen=True)
class _Window:
    """What a unit sees of a map below: ``size`` rows from ``stride * its row - padding`` on; columns alike."""

    size: int
    stride: int
    padding: int

    def through(self, conv: nn.Conv2d) -> _Window:
        """The same unit's window one convolution further down."""
        k, s, p = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        return _Window((self.size - 1) * s + k, self.stride * s, self.padding * s + p)

    def start(self, row: int) -> int:
        """The first row of the map below that a unit in ``row`` sees; negative in the padding."""
        return row * self.stride - self.padding

    def place(self, row: int, height: int) -> slice:
        """What a unit in ``row`` sees of a map of ``height`` rows."""
        ends = (self.start(row), self.start(row) + self.size)
        return slice(*(min(max(end, 0), height) for end in ends))

    def within(self, row: int, height: int) -> slice:
        """The same rows, counted within the window."""
        start, place = self.start(row), self.place(row, height)
        return slice(place.start - start, place.stop - start)

    def patches(self, maps: Tensor, height: int, width: int) -> Tensor:
        """[height, width, C, size, size] of a map [C, H, W] with zeros around it."""
        wide = pad(maps, [self.padding] * 4)
        cut = wide.unfold(1, self.size, self.stride).unfold(2, self.size, self.stride)
        return cut[:, :height, :width].permute(1, 2, 0, 3, 4)

    def across(self, rows: Tensor, maps: Tensor) -> Tensor:
        """``maps`` [h, w, C, J, K, W], after windows [h, w, C, J, K, K] have been written into their columns."""
        for x in range(rows.shape[1]):
            maps[:, x, ..., self.place(x, maps.shape[-1])] = rows[:, x, ..., self.within(x, maps.shape[-1])]
        return maps


_OWN = _Window(1, 1, 0)


@final
@dataclass(frozen=True, eq=False)
class ConvChain:
    """Convolutions [stage] and the units [h, w] behind each."""

    stages: Sequence[Stage]
    sizes: Sequence[tuple[int, int]]
    input_size: tuple[int, int]

    def features(self, params: Params, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features [B, C * h * w] of normalised images, and the activations' derivatives [B, C, h, w] by stage."""
        maps, before = inputs, []
        for name, conv, activation in self.stages:
            maps = conv2d(maps, params[f"{name}.weight"], params.get(f"{name}.bias"), conv.stride, conv.padding)
            before.append(maps)
            maps = maps if activation is None else activation(maps)

        def activated(*maps: Tensor) -> list[Tensor]:
            return [m if stage[2] is None else stage[2](m) for stage, m in zip(self.stages, maps, strict=True)]

        # one call for all stages: its fixed cost exceeds their work
        _, backward = vjp(activated, *before)  # type: ignore[misc]  # a third value comes with has_aux alone
        return maps.flatten(1), list(backward([torch.ones_like(m) for m in before]))

    def lengths(self, params: Params, slopes: Sequence[Tensor]) -> Tensor:
        """||d feature / d normalised image|| [C * h * w] of one image, from its ``slopes`` [C, h, w]."""
        (h, w), (height, _) = self.sizes[-1], self.sizes[1]
        upper, bands = self._upper(params, slopes), self._gram(params, slopes)
        row_of_features, row_of_units = len(upper) // h, upper.shape[1] // height
        sees = [self._window(1).place(row, height) for row in range(h)]
        squares = upper.new_zeros(h, row_of_features)
        for y, band in enumerate(bands):
            rows = [row for row in range(h) if sees[row].start <= y < sees[row].stop]
            if rows and len(band):
                u = upper[rows[0] * row_of_features : (rows[-1] + 1) * row_of_features, y * row_of_units :]
                part = ((u[:, : len(band)] @ band) * u[:, :row_of_units]).sum(1).view(len(rows), -1)
                squares = squares + pad(part, (0, 0, rows[0], h - rows[-1] - 1))
        # rounding may leave less than nothing
        lengths = (2 * squares).clamp(min=0).sqrt().view(h, w, -1).permute(2, 0, 1)
        return (lengths * slopes[-1].abs()).flatten()

    def _window(self, stage: int) -> _Window:
        """What a feature sees of the map behind ``stage``."""
        window = _OWN
        for _, conv, _ in reversed(self.stages[stage + 1 :]):
            window = window.through(conv)
        return window

    def _upper(self, params: Params, slopes: Sequence[Tensor]) -> Tensor:
        """U, the features by the second convolution's activations: [h * w * C, H * C' * W] of the two maps."""
        (h, w), (height, width) = self.sizes[-1], self.sizes[1]
        rows = params[f"{self.stages[-1][0]}.weight"].expand(h, w, -1, -1, -1, -1)
        for stage in range(len(self.stages) - 2, 1, -1):
            name, conv, _ = self.stages[stage]
            rows = _spread(rows, self._window(stage).patches(slopes[stage], h, w), params[f"{name}.weight"], conv)
        window = self._window(1)
        in_columns = window.across(rows, rows.new_zeros(*rows.shape[:-1], width))
        placed = rows.new_zeros(h, w, rows.shape[2], height, rows.shape[3], width)
        for y in range(h):
            placed[y, :, :, window.place(y, height)] = in_columns[y, ..., window.within(y, height), :].transpose(2, 3)
        return placed.flatten(0, 2).flatten(1)

    def _gram(self, params: Params, slopes: Sequence[Tensor]) -> list[Tensor]:
        """Half of V V' as bands: [y] holds what rows y, y + 1, ... of the cut have in common with row y,
        [rows * C * W, C * W], of which y with itself is halved."""
        (height, width), (tall, wide) = self.sizes[1], self.input_size
        (first, lower, _), (second, upper, _) = self.stages[:2]
        window = _OWN.through(upper)
        rows = params[f"{second}.weight"] * slopes[1].permute(1, 2, 0).contiguous()[..., None, None, None]
        rows = _spread(rows, window.patches(slopes[0], height, width), params[f"{first}.weight"], lower)
        window = window.through(lower)
        placed = rows.new_zeros(*(rows.shape[i] for i in (0, 2, 1, 4, 3)), wide)
        window.across(rows, placed.permute(0, 2, 1, 4, 3, 5))  # a view
        placed = placed.flatten(1, 2).flatten(3)  # [H, C * W, window's rows, pixels' channels * wide]
        bands = []
        for y in range(height):
            blocks = [rows.new_zeros(0, placed.shape[1])]
            for other in range(y, height):
                start, stop = window.place(other, tall).start, window.place(y, tall).stop
                if start >= stop:
                    break
                one, two = (
                    placed[r, :, start - top : stop - top].flatten(1)
                    for r, top in ((y, window.start(y)), (other, window.start(other)))
                )
                blocks.append(two @ one.mT / 2 if other == y else two @ one.mT)
            bands.append(torch.cat(blocks))
        return bands


def _spread(rows: Tensor, slopes: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
    """Windows [h, w, C, I, k, k] by a convolution's activations, whose derivatives are ``slopes`` [h, w, I, k, k], as
    windows [h, w, C, J, K, K] by its inputs."""
    h, w, C, _, k, _ = rows.shape
    # elementwise operations are slow on many short rows, which a window's are: each is one long row here
    rows = rows.flatten(3) * slopes.flatten(2).contiguous()[:, :, None]
    stride, K = conv.stride[0], (k - 1) * conv.stride[0] + weight.shape[-1]
    if stride == 1:
        # a convolution of the padded windows with the turned kernel is faster on CPUs than a transposed one
        maps, turned = rows.view(-1, len(weight), k, k), weight.flip(2, 3).transpose(0, 1).contiguous()
        return conv2d(maps, turned, padding=weight.shape[-1] - 1).view(h, w, C, -1, K, K)
    # transposed convolutions with strides are slow on CPUs: the same as one matrix product
    table = weight.new_zeros(len(weight), k, k, weight.shape[1], K, K)
    for y, x in product(range(k), range(k)):
        down, across = (slice(i * stride, i * stride + weight.shape[-1]) for i in (y, x))
        table[:, y, x, :, down, across] = weight
    return (rows.view(-1, rows.shape[-1]) @ table.flatten(0, 2).flatten(1)).view(h, w, C, -1, K, K)


def conv_chain(victim: Victim, head: Head) -> ConvChain | None:
    """The victim's features as a chain of at least three convolutions, or None where they are anything else."""
    module = victim.module
    layers = [(n, m) for n, m in module.named_modules() if type(m) is not nn.Sequential]
    ends = [type(m) for _, m in layers[-2:]] == [nn.Flatten, nn.Linear]
    if type(module) is not nn.Sequential or not ends or f"{layers[-1][0]}.weight" != head.weight:
        return None
    stages: list[Stage] = []
    for name, layer in layers[:-2]:
        if type(layer) is nn.Conv2d and _plain(layer):
            stages.append((name, layer, None))
        elif type(layer) in ELEMENTWISE and stages and stages[-1][2] is None and not getattr(layer, "inplace", False):
            stages[-1] = (*stages[-1][:2], layer)
        else:
            return None
    _, height, width = victim.input_shape
    sizes = []
    for _, conv, _ in stages:
        k, s, p = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        height, width = (height + 2 * p - k) // s + 1, (width + 2 * p - k) // s + 1
        sizes.append((height, width))
    if len(stages) < 3 or sizes[1][0] * sizes[1][1] * stages[1][1].out_channels > MOST_CUT:
        return None
    return ConvChain(stages, sizes, victim.input_shape[1:])


def _plain(conv: nn.Conv2d) -> bool:
    """Square, with zeros around, and one group."""
    square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
    return (
        square and not isinstance(conv.padding, str) and conv.padding_mode == "zeros"
        and conv.groups == 1 and conv.dilation == (1, 1)
    )  # fmt: skip
