"""APRIL by search: two distances at once, on transformers of any design."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from attack_problems import problem, psnr_db
from torch import Tensor, nn

from gia_bench.attacks.april import April
from gia_bench.attacks.april_optimized import WithPositions, april_optimized
from gia_bench.attacks.distances import Cosine, Euclidean
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.seeding import seeded


class Block(nn.Module):
    """The design of most transformers: a norm before the attention and a skip connection around it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(z)).chunk(3, -1)
        mixed: Tensor = z + self.out((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return mixed


class Usual(nn.Module):
    """Images [B, 1, 8, 8], four patches and a class token."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 4, 4)
        self.token = nn.Parameter(0.02 * torch.randn(1, dim))
        self.pos_embedding = nn.Parameter(0.5 * torch.randn(5, dim))
        self.blocks = nn.Sequential(Block(dim), Block(dim))
        self.fc = nn.Linear(dim, 4)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(patches), 1, -1), patches], 1) + self.pos_embedding
        scores: Tensor = self.fc(self.blocks(tokens)[:, 0])
        return scores


def usual() -> nn.Module:
    with seeded(0, "april"):
        return Usual()


def test_the_distance_is_the_papers_two_terms_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    dummy, observed = (
        {"position": torch.randn(3, 4, generator=draw), "fc.weight": torch.randn(2, 4, generator=draw)}
        for _ in range(2)
    )
    a, b = dummy["position"].numpy().ravel(), observed["position"].numpy().ravel()
    cosine = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    squares = sum(float(((dummy[k] - observed[k]) ** 2).sum()) for k in dummy)
    assert WithPositions(weight=0.5)(dummy, observed).item() == pytest.approx(squares + 0.5 * cosine, rel=1e-5)
    assert WithPositions(weight=0.0)(dummy, observed) == Euclidean()(dummy, observed)
    inner = WithPositions(distance=Cosine(), weight=2.0)(dummy, observed).item()
    assert inner == pytest.approx(Cosine()(dummy, observed).item() + 2 * cosine, rel=1e-5)
    longer = {**observed, "position": 9 * observed["position"]}
    assert WithPositions()(longer, observed) == pytest.approx(64 * float(observed["position"].square().sum()), rel=1e-5)


def test_it_finds_the_image_of_a_transformer_that_the_closed_form_cannot_take() -> None:
    p = problem(1, module=usual())
    with pytest.raises(IncompatibleError, match="without a norm before it"):
        April().check_victim(p.victim)
    r = april_optimized(steps=200, boxed=True).reconstruct(p.observations[0], p.victim)
    assert r.labels is not None
    assert torch.equal(r.labels, p.labels[0])
    grey = torch.full_like(p.images[0], float(p.images[0].mean()))
    assert psnr_db(r.inputs, p.images[0]).item() > psnr_db(grey, p.images[0]).item()
    assert psnr_db(r.inputs, p.images[0]).item() > 12


def test_two_images_of_one_update_are_searched_together() -> None:
    p = problem(1, batch=2, module=usual())
    [o] = p.observations
    few, more = (
        april_optimized(steps=n, boxed=True).reconstruct(dataclasses.replace(o, labels=p.labels[0]), p.victim)
        for n in (1, 40)
    )
    assert more.inputs.shape == (2, 1, 8, 8)
    assert more.score < 0.1 * few.score


def test_an_update_without_positions_is_refused_with_the_way_out() -> None:
    p = problem(1)
    with pytest.raises(IncompatibleError, match="take model=vit_april"):
        april_optimized(steps=1).reconstruct(p.observations[0], p.victim)
    with pytest.raises(ConfigError, match=r"with_positions\.weight=-1"):
        WithPositions(weight=-1)
    with pytest.raises(ConfigError, match=r"with_positions\.names"):
        WithPositions(names=[])
