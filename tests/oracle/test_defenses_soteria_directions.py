"""Soteria's estimated lengths against the whole Jacobian, their law, and the exact form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from soteria_problems import CLIENTS, Scene, network, seeded_scene
from torch import Tensor, nn

from gia_bench.defenses.base import Client
from gia_bench.defenses.feature_lengths import by_backward, by_directions
from gia_bench.defenses.soteria import Soteria
from gia_bench.errors import ConfigError
from gia_bench.models.lenet import lenet
from gia_bench.models.mlp import mlp
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Noise, Update

HEAD = {"conv": "5.weight", "batch norm": "7.weight"}


def scene_of(kind: str, **options: Any) -> Scene:
    with seeded(0, "model"):
        modules: dict[str, nn.Module] = {
            "conv": network(nn.Sigmoid()),
            "mlp": mlp((3, 8, 8), 4, hidden=[24, 20]),
            "batch norm": nn.Sequential(
                nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Sigmoid(), nn.Flatten(), nn.Linear(45, 20),
                nn.BatchNorm1d(20), nn.Sigmoid(), nn.Linear(20, 4),
            ),
            "chain": lenet((3, 8, 8), 4, width=3),
        }  # fmt: skip
    return Scene(modules[kind], **options)


KINDS = ["conv", "mlp", "batch norm", "chain"]


def jacobian(scene: Scene, number: int, step: int) -> tuple[Tensor, Tensor]:
    """Features r [B, features] and d (sum of r over the batch) / d x [features, B, C, H, W], by reverse mode."""
    x = scene.normalised(scene.client(number).batch.inputs[step]).double()
    assert scene.victim.head is not None
    seen: list[Tensor] = []
    layer = scene.victim.module.get_submodule(scene.victim.head.weight.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    module = scene.victim.module.double().train()

    def total(x: Tensor) -> Tensor:
        module(x)
        return seen[-1].sum(0)

    try:
        slopes = torch.autograd.functional.jacobian(total, x)  # type: ignore[no-untyped-call]
    finally:
        handle.remove()
        module.float()
    return seen[-1].detach(), slopes


def directions_of(scene: Scene, count: int, number: int = 0) -> Noise:
    return Soteria(directions=count).draw(scene.params, scene.client(number).batch, stream(2, "noise", number))


def estimated(scene: Scene, directions: Tensor, number: int = 0) -> Tensor:
    """[features, B] of the first step."""
    client = scene.client(number)
    assert scene.victim.head is not None
    return by_directions(client, scene.victim.head, client.batch.inputs[0], directions, 64)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_the_jacobian_times_the_directions(kind: str) -> None:
    scene = scene_of(kind)
    drawn = directions_of(scene, 5)["directions"][0]
    r, slopes = jacobian(scene, 0, 0)
    moved = torch.einsum("fbchw,bnchw->nfb", slopes, drawn.double())
    client = scene.client(0)
    assert scene.victim.head is not None
    own_r, own = by_directions(client, scene.victim.head, client.batch.inputs[0], drawn, 64)
    torch.testing.assert_close(own, moved.square().mean(0).sqrt().float(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(own_r, r.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_squares_scatter_about_the_exact_ones_by_the_chi_square_law(kind: str) -> None:
    scene, count = scene_of(kind), 2000
    own = estimated(scene, directions_of(scene, count)["directions"][0]).double()
    client = scene.client(0)
    assert scene.victim.head is not None
    exact = by_backward(client, scene.victim.head, client.batch.inputs[0], 64)[1].double()
    moves = exact > 0
    ratios = (own / exact)[moves].square().numpy() * count
    # every (J v)_f is normal with variance ||J_f||^2; all of them within bounds that one in 10,000 sets would leave
    miss = 1e-4 / ratios.size
    assert moves.any() and not own[~moves].any()
    assert (ratios > chi2.ppf(miss / 2, count)).all() and (ratios < chi2.isf(miss / 2, count)).all()


def test_more_directions_come_closer_to_the_exact_columns() -> None:
    scene = seeded_scene(nn.Sigmoid())

    def dropped(defense: Soteria, number: int, noise: Noise) -> Tensor:
        sent, _ = defense.protect(scene.update(number), scene.client(number), {}, {}, noise)
        return (sent["5.weight"] == 0).all(0)

    exact = [dropped(Soteria(), c, {}) for c in range(CLIENTS)]
    shares = []
    for count in (1, 16, 256):
        defense, found = Soteria(directions=count), []
        for seed in range(10):
            for c in range(CLIENTS):
                noise = defense.draw(scene.params, scene.client(c).batch, stream(seed, c))
                found.append(float((dropped(defense, c, noise) & exact[c]).sum() / exact[c].sum()))
        shares.append(np.mean(found))
    # by chance alone 60 % of the dropped ones would be dropped
    assert shares[0] < shares[1] < shares[2]
    assert shares[0] > 0.62 and shares[2] > 0.9


@pytest.mark.parametrize("kind", ["conv", "batch norm"])
def test_the_kept_columns_are_numpys_and_every_local_step_has_directions_of_its_own(kind: str) -> None:
    scene, defense = scene_of(kind, steps=2), Soteria(directions=3)
    client, update, noise = scene.client(1), scene.update(1), directions_of(scene, 3, 1)
    drawn = noise["directions"]
    assert drawn.shape == (2, 4, 3, 3, 8, 8) and not torch.equal(drawn[0], drawn[1])
    scores = np.zeros(20)
    for s in range(2):
        r, slopes = jacobian(scene, 1, s)
        moved = torch.einsum("fbchw,bnchw->nfb", slopes, drawn[s].double())
        lengths = moved.square().mean(0).sqrt().numpy()
        scores += (lengths / (r.T.numpy() + 0.1) * client.batch.mask[s].numpy()).sum(1)
    kept = torch.from_numpy(np.abs(scores) >= np.percentile(scores, 60))
    sent, _ = defense.protect(update, client, {}, {}, noise)
    assert torch.equal(sent[HEAD[kind]], update[HEAD[kind]] * kept)
    assert all(torch.equal(sent[k], update[k]) for k in update if k != HEAD[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [2, 64])
def test_a_loop_and_vmap_over_clients_keep_the_same_columns(kind: str, at_once: int) -> None:
    scene, defense = scene_of(kind, steps=2), Soteria(directions=4, features_at_once=at_once)
    updates = {k: torch.stack([scene.update(c)[k] for c in range(CLIENTS)]) for k in scene.params}
    noises = [directions_of(scene, 4, c) for c in range(CLIENTS)]
    buffers = {k: b.expand(CLIENTS, *b.shape) for k, b in scene.buffers.items()}

    def protect(update: Update, batch: Batch, buffers: dict[str, Tensor], noise: Noise) -> Update:
        return defense.protect(update, Client(scene.victim, scene.params, buffers, batch), {}, {}, noise)[0]

    stacked = {"directions": torch.stack([n["directions"] for n in noises])}
    with torch.no_grad():
        together = torch.vmap(protect)(updates, scene.batches, buffers, stacked)
    for c in range(CLIENTS):
        alone = protect(scene.update(c), Batch(*(t[c] for t in scene.batches)), scene.buffers, noises[c])
        assert all(torch.equal(together[k][c], u) for k, u in alone.items())


def test_padding_draws_nothing_and_has_no_say() -> None:
    scene, defense = seeded_scene(nn.Sigmoid()), Soteria(directions=4)
    client = scene.client(1)
    cut = client._replace(batch=Batch(*(t[:, :2] for t in client.batch)))
    noise = directions_of(scene, 4, 1)
    own = defense.draw(scene.params, cut.batch, stream(2, "noise", 1))
    assert torch.equal(noise["directions"][:, :2], own["directions"]) and not noise["directions"][:, 2:].any()
    padded, _ = defense.protect(scene.update(1), client, {}, {}, noise)
    exact, _ = defense.protect(scene.update(1), cut, {}, {}, own)
    assert torch.equal(padded["5.weight"], exact["5.weight"])


def test_the_stream_alone_decides_and_the_exact_form_draws_nothing() -> None:
    scene = seeded_scene(nn.Sigmoid())
    assert Soteria().draw(scene.params, scene.client(0).batch, stream(0)) == {}
    one, again, other = (directions_of(scene, 4, c)["directions"] for c in (0, 0, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_how_many_directions_are_followed_together_changes_nothing() -> None:
    scene, noise = scene_of("batch norm"), directions_of(scene_of("batch norm"), 6)
    few, _ = Soteria(directions=6, features_at_once=5).protect(scene.update(0), scene.client(0), {}, {}, noise)
    all_of_them, _ = Soteria(directions=6).protect(scene.update(0), scene.client(0), {}, {}, noise)
    assert torch.equal(few["7.weight"], all_of_them["7.weight"])


def test_a_feature_that_no_pixel_moves_scores_zero_and_is_dropped_as_in_the_exact_form() -> None:
    scene = seeded_scene(nn.ReLU())
    # feature 7 is 0 for every image, so that at epsilon 0 its score would be 0 / 0
    scene.params["3.bias"][7] = -1e3
    lengths = estimated(scene, directions_of(scene, 4)["directions"][0])
    assert not lengths[7].any()
    for defense, noise in ((Soteria(epsilon=0.0), {}), (Soteria(epsilon=0.0, directions=4), directions_of(scene, 4))):
        sent, _ = defense.protect(scene.update(0), scene.client(0), {}, {}, noise)
        assert not sent["5.weight"][:, 7].any() and sent["5.weight"].isfinite().all()


@pytest.mark.parametrize("broken", ["update", "weights"])
def test_nan_reaches_the_server_as_in_the_exact_form(broken: str) -> None:
    scene, update = seeded_scene(nn.Sigmoid()), seeded_scene(nn.Sigmoid()).update(0)
    where = update if broken == "update" else scene.params
    name = "5.weight" if broken == "update" else "0.weight"
    where[name] = torch.full_like(where[name], torch.nan)
    sent, _ = Soteria(prune=1.0, directions=4).protect(update, scene.client(0), {}, {}, directions_of(scene, 4))
    exact, _ = Soteria(prune=1.0).protect(update, scene.client(0), {}, {}, {})
    assert torch.equal(sent["5.weight"].isnan(), exact["5.weight"].isnan())
    assert torch.equal(sent["5.weight"] == 0, exact["5.weight"] == 0)
    assert sent["5.weight"].isnan().all() if broken == "update" else (sent["5.weight"] != 0).all()


@pytest.mark.parametrize("number", [0, -3, 2.5, True, float("inf"), float("nan")])
def test_directions_that_are_no_count_are_refused_with_the_way_out(number: Any) -> None:
    with pytest.raises(ConfigError, match="whole number of at least 1, or null for the exact lengths"):
        Soteria(directions=number)
