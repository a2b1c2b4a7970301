"""Small generators whose images are known, for the tests of what searches them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attack_problems import Problem, problem
from torch import Tensor, nn

from gia_bench.generators.dcgan import Dcgan
from gia_bench.generators.generator import Generator
from gia_bench.generators.load import Saved, content_of
from gia_bench.values import Batch, Observation

LATENT = 4


def dcgan(shape: tuple[int, int, int] = (1, 8, 8), classes: int | None = 4, latent: int = LATENT) -> Dcgan:
    """With weights so large that its images differ by more than their mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = Dcgan(shape=shape, latent_dim=latent, channels=(8, 6), num_classes=classes)
        for parameter in made.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.5)
        for norm in made.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
    return made.eval()


def config_of(made: Dcgan, shape: tuple[int, int, int] = (1, 8, 8)) -> dict[str, Any]:
    return {
        "shape": list(shape), "latent_dim": made.latent_dim, "channels": [8, 6], "num_classes": made.num_classes
    }  # fmt: skip


def saved(folder: Path, **changed: Any) -> Saved:
    """A file as gia-bench-prior writes it."""
    made = dcgan(**changed)
    path = folder / "generator.pt"
    torch.save(content_of(made, config_of(made, changed.get("shape", (1, 8, 8))), {"dataset": "none"}), path)
    return Saved(path=str(path))


@dataclass(frozen=True)
class Held:
    """A generator in memory, instead of a file."""

    module: nn.Module
    num_classes: int | None = 4
    latent_shape: tuple[int, ...] = (LATENT,)
    output_range: tuple[float, float] = (0.0, 1.0)

    def __repr__(self) -> str:
        return "Held()"

    def load(self) -> Generator:
        return Generator(
            module=self.module, latent_shape=self.latent_shape, output_range=self.output_range,
            num_classes=self.num_classes, fingerprint="held",
        )  # fmt: skip


class Conditioned(nn.Module):
    """In the shape of BigGAN's: every layer after the first is told latents and labels anew, and scales by them."""

    class Block(nn.Module):
        """Twice the size; channels are scaled and moved by the condition."""

        def __init__(self, before: int, after: int, told: int) -> None:
            super().__init__()
            self.grow = nn.ConvTranspose2d(before, after, 4, 2, 1)
            self.scale, self.shift = nn.Linear(told, after), nn.Linear(told, after)

        def forward(self, x: Tensor, told: Tensor) -> Tensor:
            grown: Tensor = self.grow(x) * self.scale(told)[..., None, None] + self.shift(told)[..., None, None]
            return grown.tanh()

    class First(nn.Module):
        """From latents and labels side by side; the condition is not needed."""

        def __init__(self, told: int) -> None:
            super().__init__()
            self.linear = nn.Linear(told, 8 * 4)

        def forward(self, x: Tensor, told: Tensor) -> Tensor:
            made: Tensor = self.linear(x).unflatten(1, (8, 2, 2)).tanh()
            return made

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        told = LATENT + classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.layers = nn.ModuleList([self.First(told), self.Block(8, 6, told), self.Block(6, 1, told)])
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.5)
        self.eval()

    def condition(self, latents: Tensor, classes: Tensor) -> Tensor:
        return torch.cat([latents, classes], 1)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        x = told = self.condition(latents, classes)
        for layer in self.layers:
            x = layer(x, told)
        return x


def in_range(
    victims: int,
    source: Held,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    label_seed: int = 5,
    **changed: Any,
) -> tuple[Problem, Tensor]:
    """A problem whose images the generator makes, of latents [V, B, *latent_shape]."""
    p = problem(victims, batch=batch, dtype=dtype, **changed)
    draw = torch.Generator().manual_seed(label_seed)
    latents = torch.randn(victims, batch, *source.latent_shape, generator=draw, dtype=dtype)
    classes = nn.functional.one_hot(p.labels, p.victim.num_classes).to(dtype)
    generator = source.load().like(latents)
    with torch.no_grad():
        images = generator.images(latents.flatten(0, 1), classes.flatten(0, 1)).unflatten(0, (victims, batch))
    assert images.flatten(2).std(2).min() > 0.1, "flat images prove nothing"
    return resent(p, images), latents


def resent(p: Problem, images: Tensor) -> Problem:
    """The same problem with other images [V, B, C, H, W]."""
    return dataclasses.replace(p, images=images, observations=[_sent(p, v, x) for v, x in enumerate(images)])


def _sent(p: Problem, v: int, images: Tensor) -> Observation:
    own = Batch(images, p.labels[v], images.new_ones(len(images)))
    seen = p.observations[v]
    update = torch.func.grad(lambda q: p.victim.objective(q, seen.buffers, own)[0])(seen.params)
    return dataclasses.replace(seen, update=update)
