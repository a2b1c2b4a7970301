"""A generator as attacks use it: any module from latents to images, with what must be known of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gia_bench.errors import ConfigError, IncompatibleError


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Generator:
    """module: from latents [N, *latent_shape], drawn from a standard normal, to images [N, C, H, W] in output_range; it
    is used in evaluation mode, so that images do not depend on each other. num_classes: of the labels it is told, as
    probabilities [N, num_classes], its second argument; None: it is told none. fingerprint: of the file's content.
    image_size: (H, W) to which its images are resampled (bilinear, antialiased); None: they stay as it makes them.

    Where it can be cut into layers (an ``nn.Sequential``, or a module whose attribute ``layers`` holds them in order),
    attacks may search between them. The first one takes latents and labels side by side. Where every layer is told the
    latents or labels anew (the blocks of BigGAN and StyleGAN), the module has a method ``condition``, from what it
    takes itself to a tensor that is each layer's second argument.

    Raises ``ConfigError`` for a module that does not give images from such latents.
    """

    module: nn.Module
    latent_shape: tuple[int, ...]
    output_range: tuple[float, float]
    num_classes: int | None
    fingerprint: str
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        low, high = self.output_range
        if not low < high:
            raise ConfigError(f"generator.output_range={[low, high]}: give the lowest value, then the highest.")
        if not self.latent_shape or min(self.latent_shape) < 1:
            raise ConfigError(f"generator.latent_shape={list(self.latent_shape)}: give sizes of at least 1.")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ConfigError(f"generator.image_size={list(self.image_size)}: give a height and a width, or null.")
        self.module.eval()
        for parameter in self.module.parameters():  # requires_grad_ of a TorchScript module is refused
            parameter.requires_grad_(False)

    def image_shape(self) -> tuple[int, ...]:
        """What one latent gives, without the batch axis. Raises ``ConfigError`` where it gives nothing of the kind."""
        like = next(self.module.parameters(), torch.zeros(0))
        two = like.new_zeros(2, *self.latent_shape), like.new_zeros(2, self.num_classes or 0)
        try:
            with torch.no_grad():
                images = self.images(*two)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = str(error).strip().split("\n")[-1][:200]
            told = f" and labels [2, {self.num_classes}]" if self.num_classes else ""
            raise ConfigError(
                f"The generator makes no images of latents {list(two[0].shape)}{told} ({reason}); give its "
                "latent_shape, and num_classes where it is told labels (null where it is not)."
            ) from error
        if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != 2:
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ConfigError(f"The generator gives {got} for two latents; expected images [2, C, H, W].")
        return tuple(images.shape[1:])

    def like(self, tensor: Tensor) -> Generator:
        """The same generator on the device and in the dtype of ``tensor``."""
        return dataclasses.replace(self, module=copy.deepcopy(self.module).to(tensor.device, tensor.dtype))

    def images(self, latents: Tensor, classes: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Images [N, C, H, W] in [0, 1].

        classes: [N, num_classes], ignored by a generator that is told no labels; params: by name, instead of its own.
        """
        if params is not None:
            made = functional_call(self.module, dict(params), self._arguments(latents, classes))
        else:
            made = self.module(*self._arguments(latents, classes))
        return self._finished(made)

    def images_from(self, features: Tensor, layer: int, latents: Tensor, classes: Tensor) -> Tensor:
        """Images from the features after ``layer`` layers (at least 1); latents, classes: that all layers are told."""
        made, told = features, self._told(latents, classes)
        for part in self._layers()[layer:]:
            made = part(made, *told)
        return self._finished(made)

    def features(self, before: Tensor, layer: int, latents: Tensor, classes: Tensor) -> Tensor:
        """What ``layer`` (from 1) makes of the features before it; layer 0 of the latents, whatever ``before`` is."""
        given = before if layer else torch.cat(self._arguments(latents, classes), 1)
        made: Tensor = self._layers()[layer](given, *self._told(latents, classes))
        return made

    def _finished(self, made: Tensor) -> Tensor:
        """In [0, 1], and of the size that is wanted."""
        low, high = self.output_range
        unit: Tensor = made if (low, high) == (0, 1) else (made - low) / (high - low)
        if self.image_size is None:
            return unit
        # autocast hands on bf16, for which this has no kernel on the CPU
        unit = unit if unit.dtype == torch.float64 else unit.float()
        return nn.functional.interpolate(unit, self.image_size, mode="bilinear", antialias=True)

    def num_layers(self) -> int:
        """How many layers it is made of. Raises ``IncompatibleError`` where it cannot be cut into layers."""
        layers = self._layers()
        like = next(self.module.parameters(), torch.zeros(0))
        latents = torch.linspace(-1, 1, 2 * torch.Size(self.latent_shape).numel()).view(2, *self.latent_shape).to(like)
        classes = like.new_ones(2, self.num_classes or 0)
        with torch.no_grad():
            one_by_one = self.images_from(self.features(latents, 0, latents, classes), 1, latents, classes)
            if not torch.allclose(one_by_one, self.images(latents, classes), atol=1e-4):
                raise IncompatibleError(
                    "The generator's layers, one after the other, do not give its images; its forward must do nothing "
                    "else. Take attack=[gias], which searches no layers."
                )
        return len(layers)

    def params(self) -> dict[str, Tensor]:
        """Its trained tensors by name. Raises ``IncompatibleError`` where they cannot be replaced."""
        if isinstance(self.module, torch.jit.ScriptModule):
            raise IncompatibleError(
                "The parameters of a TorchScript generator cannot be changed for one victim; give a state dict with "
                "the class that it belongs to (gia_bench.generators.load.StateDict), or take attack=[ggl]."
            )
        return {k: v.detach() for k, v in self.module.named_parameters()}

    def _arguments(self, latents: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        return (latents,) if self.num_classes is None else (latents, classes.to(latents.dtype))

    def _told(self, latents: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        """The further argument of every layer."""
        condition = getattr(self.module, "condition", None)
        return () if condition is None else (condition(*self._arguments(latents, classes)),)

    def _layers(self) -> Sequence[nn.Module]:
        module = self.module
        layers = module if isinstance(module, nn.Sequential) else getattr(module, "layers", None)
        if not isinstance(layers, nn.Sequential | nn.ModuleList) or len(layers) < 2:
            raise IncompatibleError(
                "This generator cannot be cut into layers: it must be an nn.Sequential, or hold its layers in the "
                "attribute `layers` (nn.ModuleList or nn.Sequential, at least 2). Take attack=[gias] or attack=[ggl]."
            )
        return list(layers)
