"""A small vision transformer whose first attention reads the embedded patches directly, as APRIL needs it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from gia_bench.errors import ConfigError
from gia_bench.models.shapes import ImageShape, require_positive


def vit_april(
    input_shape: ImageShape,
    num_classes: int,
    *,
    patch_size: int = 4,
    dim: int = 192,
    depth: int = 2,
    heads: int = 4,
    mlp_ratio: float = 2.0,
    position_std: float = 1.0,
) -> nn.Module:
    """Patches, a class token and learnable positions, then encoders without skip connections: attention, LayerNorm,
    MLP, so that the first attention gets exactly the sum of patch and position (Lu et al., CVPR 2022, design A).

    patch_size: pixels; images are padded with zeros at the right and the bottom to a whole number of patches; dim: of a
    token, a multiple of heads; depth: encoders (one alone gives gradients of too low a rank for the closed form);
    mlp_ratio: the MLP's hidden size over dim; position_std: of the positions at the start. Sizes are gia_bench choices.
    Raises ``ConfigError`` for a size below 1, a dim that the heads do not divide, or a position_std that is not
    positive.
    """
    require_positive("patch_size", [patch_size])
    require_positive("dim", [dim])
    require_positive("depth", [depth])
    require_positive("heads", [heads])
    require_positive("mlp_ratio * dim", [int(mlp_ratio * dim)])
    if dim % heads:
        raise ConfigError(f"model.network.heads={heads} must divide dim={dim}.")
    if position_std <= 0:
        raise ConfigError(f"model.network.position_std={position_std}: give a positive number.")
    return VisionTransformer(
        input_shape, num_classes, patch_size, dim, depth, heads, int(mlp_ratio * dim), position_std
    )


@final
class Attention(nn.Module):
    """Multi-head self-attention: [B, N, dim] -> [B, N, dim]. Written out, so that it runs under vmap and twice
    through autograd."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = (layer(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


@final
class VisionTransformer(nn.Module):
    """Images [B, C, H, W] -> scores [B, num_classes] from the class token. Built by ``vit_april``."""

    def __init__(
        self,
        input_shape: ImageShape,
        num_classes: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        position_std: float,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.patch_size = patch_size
        self.grid = (-(-height // patch_size), -(-width // patch_size))
        self.patch = nn.Linear(channels * patch_size**2, dim)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, dim))
        self.position = nn.Parameter(position_std * torch.randn(1 + self.grid[0] * self.grid[1], dim))
        self.encoders = nn.Sequential(*(_encoder(dim, heads, hidden) for _ in range(depth)))
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(self.patches(images))
        tokens = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], 1) + self.position
        scores: Tensor = self.fc(self.encoders(tokens)[:, 0])
        return scores

    def patches(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, patches, C * patch_size ** 2], row by row."""
        bottom, right = (n * self.patch_size - size for n, size in zip(self.grid, images.shape[-2:], strict=True))
        padded = nn.functional.pad(images, (0, right, 0, bottom))
        return nn.functional.unfold(padded, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def assemble(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of ``patches`` for images of height and width ``size``."""
        whole = (self.grid[0] * self.patch_size, self.grid[1] * self.patch_size)
        images = nn.functional.fold(patches.transpose(1, 2), whole, self.patch_size, stride=self.patch_size)
        return images[..., : size[0], : size[1]]


def _encoder(dim: int, heads: int, hidden: int) -> nn.Module:
    mlp = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)]
    return nn.Sequential(Attention(dim, heads), nn.LayerNorm(dim), *mlp)
