"""Any classifier of torchvision, made fit for gradient inversion: nothing random, nothing in place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.ops import StochasticDepth

from gia_bench.errors import ConfigError, DataError, choices
from gia_bench.models.checkpoint import UNREADABLE
from gia_bench.models.shapes import ImageShape

# these return a tuple while they train unless told otherwise, and warn about a slow default initialisation
_SPECIAL = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}


def torchvision_classifier(
    input_shape: ImageShape,
    num_classes: int,
    *,
    name: str,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The classifier ``name`` of ``torchvision.models``, with these differences from torchvision's:

    - the last layer is a new, untrained one if ``weights`` were trained on another number of classes;
    - the first convolution takes ``input_shape``'s channels; trained RGB kernels are summed for grayscale images,
      which gives the scores of the image repeated three times;
    - dropout and stochastic depth have p = 0 and no layer works in place, for double backward and ``vmap``.

    weights: null, DEFAULT, or one of torchvision's names (IMAGENET1K_V1), fetched or read from torch's cache;
    options: more arguments of torchvision's builder, for example ``{image_size: 32}`` for ``vit_b_16``.
    Raises ``ConfigError`` for unknown names, and ``DataError`` if trained weights cannot be had.
    """
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known
        raise ConfigError(choices("model.network.name", name, near))
    arguments = {**_SPECIAL.get(name, {}), **(options or {})}
    trained = None if weights is None else _trained(name, weights)
    if trained is None:
        arguments |= {"num_classes": num_classes} | ({"init_weights": True} if name in _SPECIAL else {})
    try:
        model: nn.Module = models.get_model(name, weights=trained, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.network.options={dict(options or {})} does not fit {name}: {error}.") from error
    if trained is not None:
        _replace_head(model, len(trained.meta["categories"]), num_classes)
    _replace_stem(model, input_shape[0], trained=trained is not None)
    return tame(model)


def tame(model: nn.Module) -> nn.Module:
    """``model`` itself, changed so that it is the same function at every call and has second derivatives: dropout
    and stochastic depth with p = 0, no layer in place, attention and hard sigmoid without their fused kernels.
    Parameters stay."""
    for path in [path for path, part in model.named_modules() if isinstance(part, nn.Hardsigmoid)]:
        model.set_submodule(path, HardSigmoid())
    for part in model.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd | StochasticDepth):
            part.p = 0.0
        if isinstance(getattr(part, "inplace", None), bool):
            part.inplace = False  # type: ignore[assignment]
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
            # asked for its weights, attention takes the plain path; the fused one has no second derivative
            part.register_forward_pre_hook(_plain_attention, with_kwargs=True)
    return model


@final
class HardSigmoid(nn.Module):
    """torch's ``Hardsigmoid`` made of an operation that has a second derivative (MobileNetV3)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x + 3) / 6


def _trained(name: str, weights: str) -> WeightsEnum:
    """The entry ``weights`` of this model, after its file was fetched and read without running any code in it."""
    available = models.get_model_weights(name)
    if weights not in available.__members__:
        raise ConfigError(choices("model.network.weights", weights, ["null", *available.__members__]))
    chosen = available[weights]
    try:
        chosen.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        raise DataError(
            f"model.network.weights={weights} of {name} cannot be had ({error}): fetch {chosen.url} and put it into "
            f"{torch.hub.get_dir()}/checkpoints/."
        ) from error
    return chosen


def _replace_head(model: nn.Module, trained_classes: int, num_classes: int) -> None:
    if num_classes == trained_classes:
        return
    path, head = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if isinstance(head, nn.Linear):
        model.set_submodule(path, nn.Linear(head.in_features, num_classes, bias=head.bias is not None))
    else:
        model.set_submodule(path, nn.Conv2d(head.in_channels, num_classes, kernel_size=1, bias=head.bias is not None))


def _replace_stem(model: nn.Module, channels: int, *, trained: bool) -> None:
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    if channels == stem.in_channels:
        return
    if trained and channels != 1:
        raise ConfigError(f"Trained torchvision weights take images with 3 channels or 1, got {channels}.")
    kernel = stem.weight.detach()
    stem.in_channels = channels
    if trained:
        stem.weight = nn.Parameter(kernel.sum(1, keepdim=True))
    else:
        stem.weight = nn.Parameter(kernel.new_empty(kernel.shape[0], channels, *kernel.shape[2:]))
        stem.reset_parameters()


def _plain_attention(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "need_weights": True}
