"""Three clients of one small victim, the second with padding, for the tests of Soteria."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gia_bench.defenses.base import Client
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Update

CLIENTS, EXAMPLES = 3, 4


def network(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2), activation, nn.Flatten(), nn.Linear(45, 20), activation, nn.Linear(20, 4)
    )


class Scene:
    def __init__(
        self,
        module: nn.Module,
        size: int = 8,
        num_classes: int = 4,
        examples: int = EXAMPLES,
        steps: int = 1,
    ) -> None:
        std, mean = torch.tensor([0.2, 0.5, 1.5]), torch.tensor([0.4, 0.5, 0.6])
        self.victim = Victim(module=module, input_shape=(3, size, size), num_classes=num_classes, mean=mean, std=std)
        self.params, self.buffers = self.victim.initial()
        g = stream(0, "images")
        shape = (CLIENTS, steps, examples)
        mask = torch.ones(shape)
        mask[1, :, 2:] = 0
        self.batches = Batch(
            torch.rand(*shape, 3, size, size, generator=g), torch.randint(num_classes, shape, generator=g), mask
        )

    def client(self, number: int) -> Client:
        return Client(self.victim, self.params, self.buffers, Batch(*(t[number] for t in self.batches)))

    def update(self, number: int) -> Update:
        g = stream(1, "update", number)
        return {k: torch.randn(p.shape, generator=g) for k, p in self.params.items()}

    def normalised(self, inputs: Tensor) -> Tensor:
        assert self.victim.mean is not None and self.victim.std is not None
        return (inputs - self.victim.mean.view(-1, 1, 1)) / self.victim.std.view(-1, 1, 1)


def seeded_scene(activation: nn.Module) -> Scene:
    with seeded(0, "model"):
        return Scene(network(activation))
