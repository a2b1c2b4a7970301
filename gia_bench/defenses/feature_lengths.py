"""How far the inputs of a model's head move with the image: ||d r_f / d x|| of any model, exactly or by chance."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from gia_bench.defenses.base import Client
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Head, Victim


def features(client: Client, head: Head, inputs: Tensor) -> Tensor:
    """The head's inputs [B, features] for images [B, C, H, W] in [0, 1]."""
    layer = client.victim.module.get_submodule(head.weight.removesuffix("weight").removesuffix("."))
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        client.victim.logits(client.params, client.buffers, inputs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        raise no_head()
    return seen[0]


def by_backward(client: Client, head: Head, inputs: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """Features r [B, features] and ||d r / d x|| [features, B], x as the network sees it: one backward pass per
    feature, ``at_once`` of them together. Where BatchNorm couples the examples, r is summed over them."""

    def represent(inputs: Tensor) -> Tensor:
        return features(client, head, inputs)

    r: Tensor
    r, backward = vjp(represent, inputs)  # type: ignore[misc]  # the third value comes with has_aux alone
    B, num_features = r.shape
    ones = torch.eye(num_features, dtype=r.dtype, device=r.device)

    def lengths(one: Tensor) -> Tensor:
        """||d r_f / d x|| [B]."""
        (pixels,) = backward(one.expand(B, num_features))
        length: Tensor = (pixels * _std(client.victim, pixels)).flatten(1).square().sum(1).sqrt()
        return length

    return r, vmap(lengths, chunk_size=at_once)(ones)


def by_directions(
    client: Client, head: Head, inputs: Tensor, directions: Tensor, at_once: int
) -> tuple[Tensor, Tensor]:
    """What ``by_backward`` gives, its lengths estimated from ``directions`` [B, n, C, H, W] of x, standard normal.

    The square of (d r_f / d x) v has the mean ||d r_f / d x||^2 over such v; here it is the mean over an example's n.
    All examples' directions are pushed forward together, ``at_once`` of the n. Where examples are coupled, each
    example's are pushed without the others', which is B times the work.
    """
    _set_forward_mode_up()
    B, n = directions.shape[:2]
    tangents = (directions * _std(client.victim, directions)).transpose(0, 1)
    coupled = client.victim.batch_coupled
    if coupled:
        alone = torch.eye(B, dtype=inputs.dtype, device=inputs.device).view(B, B, 1, 1, 1)
        tangents = (tangents[:, None] * alone).flatten(0, 1)

    def represent(inputs: Tensor) -> Tensor:
        return features(client, head, inputs)

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        r, moved = jvp(represent, (inputs,), (tangent,))  # type: ignore[misc]  # a third comes with has_aux alone
        return r, moved

    r, moved = vmap(push, chunk_size=at_once)(tangents)
    if coupled:
        moved = moved.sum(1).reshape(n, B, -1)
    return r[0], moved.square().mean(0).sqrt().T


@cache
def _set_forward_mode_up() -> None:
    """torch does so at the first use, and warns of a deprecated function of its own, which nobody here can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is", category=FutureWarning)
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


def normalised(victim: Victim, inputs: Tensor) -> Tensor:
    """Images in [0, 1] as the network sees them."""
    if victim.mean is None or victim.std is None:
        return inputs
    return (inputs - victim.mean.view(-1, 1, 1)) / victim.std.view(-1, 1, 1)


def _std(victim: Victim, like: Tensor) -> Tensor:
    """From d / d image to d / d normalised image [C, 1, 1]."""
    return like.new_ones(1) if victim.std is None else victim.std.to(like).view(-1, 1, 1)


def no_head() -> IncompatibleError:
    """Of a model whose last layer takes no vector of features."""
    return IncompatibleError(
        "defense soteria perturbs the input of the last linear layer, one vector per image, and the model has no such "
        "layer with one output per class; choose a model that ends in one (lenet, convnet64, resnet18)."
    )
