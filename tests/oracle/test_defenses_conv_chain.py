"""A conv chain's Jacobian lengths against automatic differentiation in double precision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gia_bench.defenses.base import Client
from gia_bench.defenses.conv_chain import ConvChain, conv_chain
from gia_bench.defenses.feature_lengths import by_backward, features
from gia_bench.defenses.soteria import Soteria
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet, lenet_zhu
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Update


def ended(layers: list[nn.Module], shape: tuple[int, int, int]) -> Victim:
    body = nn.Sequential(*layers)
    width = body(torch.zeros(1, *shape)).flatten(1).shape[1]
    module = nn.Sequential(OrderedDict(body=body, flatten=nn.Flatten(), fc=nn.Linear(width, 4)))
    mean, std = torch.linspace(0.3, 0.6, shape[0]), torch.linspace(0.2, 1.5, shape[0])
    return Victim(module=module, input_shape=shape, num_classes=4, mean=mean, std=std)


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, int, int]]] = {
    "strides and odd sizes": (lambda: [
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.Sigmoid(), nn.Conv2d(3, 2, 3, stride=2), nn.ELU(),
    ], (2, 21, 18)),
    "no padding, no activation": (lambda: [
        nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3, stride=3), nn.Sigmoid(), nn.Conv2d(3, 2, 2, stride=2),
    ], (1, 17, 16)),
    "padding beyond the kernel": (lambda: [
        nn.Conv2d(1, 2, 1, stride=2, padding=2), nn.GELU(), nn.Conv2d(2, 2, 2, padding=2), nn.SiLU(),
        nn.Conv2d(2, 2, 3, padding=3), nn.Sigmoid(),
    ], (1, 5, 6)),
    "five convolutions": (lambda: [
        layer for i in range(5) for layer in (nn.Conv2d(1 if i == 0 else 2, 2, 3, padding=1, stride=1 + (i == 3)),
                                              nn.Sigmoid())
    ], (1, 9, 8)),
    "a stride beyond the kernel": (lambda: [
        nn.Conv2d(1, 3, 2, stride=3), nn.Sigmoid(), nn.Conv2d(3, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3),
    ], (1, 14, 17)),
    "no strides": (lambda: [
        nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Conv2d(2, 3, 3), nn.Softplus(), nn.Conv2d(3, 2, 3), nn.Sigmoid(),
    ], (1, 9, 8)),
}  # fmt: skip


def lengths_by_hand(victim: Victim, image: Tensor) -> Tensor:
    """||d feature / d normalised image|| in double precision, one backward pass per feature."""
    body = nn.Sequential(*list(victim.module.children())[:-1]).double()
    try:
        jacobian = torch.func.jacrev(lambda x: body(x[None])[0])(image.double())
    finally:
        body.float()
    lengths: Tensor = jacobian.detach().flatten(1).norm(dim=1)
    return lengths


def chain_of(victim: Victim) -> ConvChain:
    assert victim.head is not None
    chain = conv_chain(victim, victim.head)
    assert chain is not None
    return chain


@pytest.mark.parametrize("name", CHAINS)
def test_lengths_are_those_of_automatic_differentiation(name: str) -> None:
    layers, shape = CHAINS[name]
    with seeded(0, "chain"):
        victim = ended(layers(), shape)
    params, _ = victim.initial()
    images = torch.randn(3, *shape, generator=stream(0, "images"))
    chain = chain_of(victim)
    r, slopes = chain.features(params, images)
    torch.testing.assert_close(r, nn.Sequential(*list(victim.module.children())[:-1])(images))
    for b in range(3):
        expected = lengths_by_hand(victim, images[b])
        assert (expected > 0).any()
        torch.testing.assert_close(
            chain.lengths(params, [s[b] for s in slopes]),
            expected.float(),
            rtol=1e-4,
            atol=1e-5 * float(expected.max()),
        )


@pytest.mark.parametrize("network", [lenet, lenet_zhu])
def test_lenets_lengths_are_those_of_automatic_differentiation(network: Callable[..., nn.Module]) -> None:
    with seeded(0, "lenet"):
        victim = Victim(module=network((3, 32, 32), 10), input_shape=(3, 32, 32), num_classes=10)
    params, _ = victim.initial()
    image = torch.randn(3, 32, 32, generator=stream(0, "images"))
    chain = chain_of(victim)
    _, slopes = chain.features(params, image[None])
    expected = lengths_by_hand(victim, image)
    torch.testing.assert_close(
        chain.lengths(params, [s[0] for s in slopes]).double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max())
    )


def test_a_feature_that_no_pixel_moves_has_length_exactly_zero() -> None:
    with seeded(0, "dead"):
        victim = ended(
            [nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Conv2d(2, 2, 3), nn.Sigmoid(), nn.Conv2d(2, 2, 3), nn.ReLU()],
            (1, 9, 9),
        )
    params, _ = victim.initial()
    params["body.4.bias"] = torch.tensor([-100.0, 100.0])
    chain = chain_of(victim)
    _, slopes = chain.features(params, torch.rand(1, 1, 9, 9, generator=stream(0)))
    lengths = chain.lengths(params, [s[0] for s in slopes]).view(2, -1)
    assert not lengths[0].any()
    assert (lengths[1] > 0).all()


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Conv2d(2, 2, 3), nn.Sigmoid()],
        [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)],
        [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 1)],
        [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, dilation=2), nn.Conv2d(2, 2, 1)],
        [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, (1, 3)), nn.Conv2d(2, 2, 1)],
        [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Conv2d(2, 2, 1)],
        [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)],
        [nn.ReLU(), nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)],
        [nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)],
    ],
    ids=["two", "pooling", "groups", "dilation", "oblong", "reflecting", "normalised", "activation first", "in place"],
)  # fmt: skip
def test_anything_else_is_left_to_backward_passes(layers: list[nn.Module]) -> None:
    victim = ended(layers, (1, 9, 9))
    assert victim.head is not None
    assert conv_chain(victim, victim.head) is None


class Scene:
    """Three clients of a small chain, the second with padding."""

    def __init__(self, name: str = "strides and odd sizes") -> None:
        layers, shape = CHAINS[name]
        with seeded(0, "scene"):
            self.victim = ended(layers(), shape)
        self.params, self.buffers = self.victim.initial()
        g, size = stream(0, "images"), (3, 1, 4)
        mask = torch.ones(size)
        mask[1, :, 2:] = 0
        self.batches = Batch(torch.rand(*size, *shape, generator=g), torch.randint(4, size, generator=g), mask)
        self.updates = {k: torch.randn(3, *p.shape, generator=g) for k, p in self.params.items()}

    def protect(self, update: Update, batch: Batch) -> Update:
        client = Client(self.victim, self.params, self.buffers, batch)
        return Soteria().protect(update, client, {}, {}, {})[0]


@pytest.mark.parametrize("name", CHAINS)
def test_a_loop_and_vmap_over_clients_keep_the_same_columns(name: str) -> None:
    scene = Scene(name)
    with torch.no_grad():
        together = torch.vmap(scene.protect)(scene.updates, scene.batches)
    for c in range(3):
        alone = scene.protect({k: u[c] for k, u in scene.updates.items()}, Batch(*(t[c] for t in scene.batches)))
        assert all(torch.equal(together[k][c], u) for k, u in alone.items())


def test_the_scores_are_those_of_backward_passes() -> None:
    scene = Scene()
    client = Client(scene.victim, scene.params, scene.buffers, Batch(*(t[0] for t in scene.batches)))
    assert scene.victim.head is not None
    inputs = client.batch.inputs[0]
    r, d = by_backward(client, scene.victim.head, inputs, 64)
    torch.testing.assert_close(r, features(client, scene.victim.head, inputs))
    chain = chain_of(scene.victim)
    assert scene.victim.mean is not None and scene.victim.std is not None
    seen = (inputs - scene.victim.mean.view(-1, 1, 1)) / scene.victim.std.view(-1, 1, 1)
    own, slopes = chain.features(scene.params, seen)
    torch.testing.assert_close(own, r)
    for b in range(len(r)):
        torch.testing.assert_close(chain.lengths(scene.params, [s[b] for s in slopes]), d[:, b], rtol=1e-4, atol=1e-6)
