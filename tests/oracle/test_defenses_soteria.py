"""Soteria against one backward pass per feature and numpy's percentile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from soteria_problems import CLIENTS, Scene, seeded_scene
from torch import nn

from gia_bench.defenses.base import Client
from gia_bench.defenses.soteria import Soteria, percentile
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet_zhu
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Observation, Params, Update


def kept_by_hand(scene: Scene, body: nn.Module, number: int, prune: float, epsilon: float) -> np.ndarray:
    """The reference's way: one backward pass per feature, to the image as the network sees it."""
    client = scene.client(number)
    x = scene.normalised(client.batch.inputs[0]).requires_grad_()
    r = body(x)
    scores = np.zeros(r.shape[1])
    for f in range(r.shape[1]):
        (pixels,) = torch.autograd.grad(r[:, f].sum(), x, retain_graph=True)
        d = pixels.flatten(1).norm(dim=1).double().numpy()
        features = r[:, f].detach().double().numpy()
        for b in torch.nonzero(client.batch.mask[0]).view(-1).tolist():
            scores[f] += d[b] / (features[b] + epsilon) if d[b] else 0
    return np.asarray(np.abs(scores) >= np.percentile(scores, 100 * prune))


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.ReLU(), nn.Tanh()], ids=["sigmoid", "relu", "tanh"])
@pytest.mark.parametrize(("prune", "epsilon"), [(0.6, 0.1), (0.01, 0.0), (0.8, 1e-10), (0.5, 0.1)])
@pytest.mark.parametrize("number", range(CLIENTS))
def test_the_kept_columns_are_those_of_one_backward_pass_per_feature(
    activation: nn.Module, prune: float, epsilon: float, number: int
) -> None:
    scene = seeded_scene(activation)
    update = scene.update(number)
    sent, state = Soteria(prune=prune, epsilon=epsilon).protect(update, scene.client(number), {}, {}, {})
    body = scene.victim.module[:-1]  # type: ignore[index]
    kept = kept_by_hand(scene, body, number, prune, epsilon)
    assert torch.equal(sent["5.weight"], update["5.weight"] * torch.from_numpy(kept))
    assert all(torch.equal(sent[k], update[k]) for k in update if k != "5.weight")
    assert state == {}


def test_the_lenet_of_the_papers_loses_the_stated_share_of_its_columns() -> None:
    with seeded(0, "lenet"):
        scene = Scene(lenet_zhu((3, 32, 32), 10), size=32, num_classes=10, examples=2)
    sent, _ = Soteria(prune=0.6).protect(scene.update(0), scene.client(0), {}, {}, {})
    assert scene.victim.head is not None
    columns = (sent[scene.victim.head.weight] != 0).any(0)
    assert int((~columns).sum()) == round(0.6 * 767 + 0.5)
    body = nn.Sequential(*list(scene.victim.module.children())[:-1])
    kept = kept_by_hand(scene, body, 0, 0.6, 0.1)
    # two scores may lie closer to the percentile than single precision can tell
    assert int((columns.numpy() != kept).sum()) <= 2


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_how_many_features_are_differentiated_together_changes_nothing(at_once: int) -> None:
    scene = seeded_scene(nn.Sigmoid())
    many, _ = Soteria(features_at_once=at_once).protect(scene.update(0), scene.client(0), {}, {}, {})
    whole, _ = Soteria(features_at_once=1000).protect(scene.update(0), scene.client(0), {}, {}, {})
    assert torch.equal(many["5.weight"], whole["5.weight"])


@pytest.mark.parametrize("at_once", [7, 64])
def test_a_loop_and_vmap_over_clients_keep_the_same_columns(at_once: int) -> None:
    scene, defense = seeded_scene(nn.Sigmoid()), Soteria(features_at_once=at_once)
    updates = {k: torch.stack([scene.update(c)[k] for c in range(CLIENTS)]) for k in scene.params}

    def protect(update: Update, batch: Batch) -> Update:
        client = Client(scene.victim, scene.params, scene.buffers, batch)
        return defense.protect(update, client, {}, {}, {})[0]

    with torch.no_grad():
        together = torch.vmap(protect)(updates, scene.batches)
    for c in range(CLIENTS):
        alone = protect(scene.update(c), Batch(*(t[c] for t in scene.batches)))
        assert all(torch.equal(together[k][c], u) for k, u in alone.items())


def test_padding_has_no_say() -> None:
    scene = seeded_scene(nn.Sigmoid())
    client = scene.client(1)
    cut = client._replace(batch=Batch(*(t[:, :2] for t in client.batch)))
    padded, _ = Soteria().protect(scene.update(1), client, {}, {}, {})
    exact, _ = Soteria().protect(scene.update(1), cut, {}, {}, {})
    assert torch.equal(padded["5.weight"], exact["5.weight"])


def test_pruning_nothing_sends_the_update_and_no_hook_stays_behind() -> None:
    scene = seeded_scene(nn.Sigmoid())
    sent, _ = Soteria(prune=0.0).protect(scene.update(0), scene.client(0), {}, {}, {})
    assert torch.equal(sent["5.weight"], scene.update(0)["5.weight"])
    assert not any(m._forward_pre_hooks for m in scene.victim.module.modules())


def test_the_percentile_is_numpys() -> None:
    for n in (1, 2, 5, 100):
        scores = torch.randn(n, generator=stream(2, n), dtype=torch.float64)
        for share in (0.0, 0.01, 0.33, 0.6, 1.0):
            assert float(percentile(scores, share)) == pytest.approx(np.percentile(scores.numpy(), 100 * share))


def test_the_surrogate_mutes_the_dropped_columns_of_the_head_alone() -> None:
    scene = seeded_scene(nn.Sigmoid())
    sent, _ = Soteria().protect(scene.update(0), scene.client(0), {}, {}, {})
    dummy: Params = {k: torch.ones_like(p) for k, p in scene.params.items()}
    stand_in = Soteria().surrogate(dummy, Observation(params=scene.params, update=sent))
    assert torch.equal(stand_in["5.weight"], (sent["5.weight"] != 0).float())
    assert all(torch.equal(stand_in[k], dummy[k]) for k in dummy if k != "5.weight")


def test_nan_in_the_head_reaches_the_server() -> None:
    scene = seeded_scene(nn.Sigmoid())
    update = scene.update(0)
    update["5.weight"] = torch.full_like(update["5.weight"], torch.nan)
    sent, _ = Soteria(prune=1.0).protect(update, scene.client(0), {}, {}, {})
    assert sent["5.weight"].isnan().all()


def test_a_model_without_a_linear_head_is_refused_with_the_way_out() -> None:
    headless = Victim(module=nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), input_shape=(3, 8, 8), num_classes=4)
    with pytest.raises(IncompatibleError, match="choose a model that ends in one"):
        Soteria().check_victim(headless)
    tokens = Scene(nn.Sequential(nn.Flatten(2), nn.Linear(64, 4), nn.Flatten(), nn.Unflatten(1, (3, 4))))
    with pytest.raises(IncompatibleError, match="one vector per image"):
        Soteria().protect(tokens.update(0), tokens.client(0), {}, {}, {})
    other = Scene(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
    with pytest.raises(IncompatibleError, match="one output per class"):
        Soteria().protect(other.update(0), other.client(0), {}, {}, {})


def test_the_percentile_between_two_infinite_scores_is_infinite() -> None:
    """epsilon=0 divides by features that are 0. inf - inf would be NaN, and keep every column."""
    scores = torch.tensor([1.0, torch.inf, 0.0, torch.inf, torch.inf])
    assert percentile(scores, 0.7) == torch.inf
    assert percentile(scores, 0.25) == 1.0
