"""Feature fishing: of a batch of one class, or of many, the examples beyond the threshold alone send gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor

from gia_bench.attacks.base import Broadcast
from gia_bench.attacks.feature_fishing import FeatureFishing, head_inputs
from gia_bench.conf_path import CONF
from gia_bench.data.source import InMemory
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet
from gia_bench.models.resnet import cifar_resnet
from gia_bench.seeding import seeded
from gia_bench.values import Batch, Observation, Params, Update

FISHING = instantiate(OmegaConf.load(CONF / "attack" / "feature_fishing.yaml"), _convert_="all")
assert isinstance(FISHING, FeatureFishing)
B = 8


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target, dtype=torch.int64)


IMAGES, LABELS = digits()
PUBLIC = InMemory(IMAGES[900:], LABELS[900:])


def victim_of(*, deep: bool = False) -> Victim:
    with seeded(0, "fishing"):
        module = cifar_resnet((1, 8, 8), 10, depth=8, width=4) if deep else lenet((1, 8, 8), 10, width=4)
    return Victim(module=module, input_shape=(1, 8, 8), num_classes=10, training=False)


def fishing(steps: int = 2, **changes: object) -> FeatureFishing:
    inner = dataclasses.replace(FISHING.attack, steps=steps)
    return dataclasses.replace(FISHING, **({"target_class": 3, "attack": inner} | changes))  # type: ignore[arg-type]


def gradient(victim: Victim, params: Params, images: Tensor, labels: Tensor) -> Update:
    own = Batch(images, labels, torch.ones(len(labels)))
    update: Update = torch.func.grad(lambda p: victim.objective(p, victim.initial()[1], own)[0])(params)
    return update


def body(update: Update) -> Tensor:
    return torch.cat([v.flatten() for k, v in update.items() if not k.startswith(("fc", "linear"))])


def beyond(attack: FeatureFishing, victim: Victim, sent: Broadcast, images: Tensor) -> Tensor:
    """1 for images on the side that is fished, 0 for the others, NaN in between: from what the last layer gets."""
    assert victim.head is not None and victim.head.bias is not None
    weight, bias = sent.params[victim.head.weight].double(), sent.params[victim.head.bias].double()
    logits = head_inputs(victim, sent.params, sent.buffers, images).double() @ weight[3] + bias[3]
    logits[logits.abs() < 10] = torch.nan  # too near to be on either side
    return torch.where(logits.isnan(), torch.nan, ((logits < 0) == (attack.fish == "target")).double())


def batch_with_one_beyond(attack: FeatureFishing, victim: Victim, sent: Broadcast) -> tuple[Tensor, Tensor, int]:
    """The first eight consecutive digits (of the class, or without it) of which exactly one is fished."""
    wanted = ((LABELS[:900] == 3) == (attack.fish == "target")).nonzero().flatten()
    out = beyond(attack, victim, sent, IMAGES[wanted])
    for start in range(len(wanted) - B):
        if float(out[start : start + B].sum()) == 1:
            rows = wanted[start : start + B]
            return IMAGES[rows], LABELS[rows], int(out[start : start + B].argmax())
    raise AssertionError("no such batch")


@pytest.mark.parametrize("fish", ["target", "others"])
@pytest.mark.parametrize("deep", [False, True])
def test_the_one_example_beyond_the_threshold_dominates_the_update_of_the_batch(fish: str, deep: bool) -> None:
    victim, attack = victim_of(deep=deep), fishing(fish=fish)
    sent = attack.tamper(Broadcast(victim, *victim.initial()), seed=1, public=PUBLIC)
    images, labels, fished = batch_with_one_beyond(attack, victim, sent)
    update = body(gradient(victim, sent.params, images, labels))
    singles = [body(gradient(victim, sent.params, images[i : i + 1], labels[i : i + 1])) for i in range(B)]
    cosine = torch.nn.functional.cosine_similarity(update, singles[fished], dim=0)
    assert cosine > 0.95
    torch.testing.assert_close(B * update, singles[fished], rtol=0.05, atol=0.01 * float(singles[fished].abs().max()))
    assert all(s.norm() < 0.05 * singles[fished].norm() for i, s in enumerate(singles) if i != fished)
    # without it no example stands out
    plain = [body(gradient(victim, victim.initial()[0], images[i : i + 1], labels[i : i + 1])) for i in range(B)]
    assert max(p.norm() for p in plain) < 5 * min(p.norm() for p in plain)


@pytest.mark.parametrize("fish", ["target", "others"])
def test_the_inner_attack_sees_the_gradient_that_the_fished_example_has_in_the_layer_it_is_given(fish: str) -> None:
    victim, attack = victim_of(), fishing(fish=fish)
    sent = attack.tamper(Broadcast(victim, *victim.initial()), seed=1, public=PUBLIC)
    images, labels, fished = batch_with_one_beyond(attack, victim, sent)
    update = gradient(victim, sent.params, images, labels)
    seen = Observation(params=sent.params, update=update, num_examples=B)
    handed = attack._alone(seen, 1, 3, "fc.weight", "fc.bias")
    assert handed.labels is not None and (handed.labels.tolist() == [3]) == (fish == "target")
    own = body(gradient(victim, handed.params, images[fished : fished + 1], handed.labels))
    torch.testing.assert_close(body(handed.update), own, rtol=0.05, atol=0.01 * float(own.abs().max()))
    # and no image is left without a gradient, so that the search never stands still
    other = (fished + 1) % B
    assert body(gradient(victim, handed.params, images[other : other + 1], handed.labels)).norm() > 0.1 * own.norm()


def test_counts_of_labels_and_of_examples_beyond_are_read_off_the_bias_and_images_are_returned() -> None:
    victim = victim_of()
    for fish in ("target", "others"):
        attack = fishing(fish=fish, steps=3)
        sent = attack.tamper(Broadcast(victim, *victim.initial()), seed=1, public=PUBLIC)
        images, labels, _ = batch_with_one_beyond(attack, victim, sent)
        seen = Observation(params=sent.params, update=gradient(victim, sent.params, images, labels), num_examples=B)
        found = attack.reconstruct(seen, victim)
        assert found.failure is None and found.labels is not None
        assert found.labels.tolist() == labels.sort().values.tolist()
        assert found.inputs.flatten(1).any(1).tolist() == [True] + [False] * (B - 1)


def test_the_fished_image_comes_back_from_a_batch_of_its_class_as_from_its_own_gradient() -> None:
    victim, attack = victim_of(), fishing(steps=40)
    sent = attack.tamper(Broadcast(victim, *victim.initial()), seed=1, public=PUBLIC)
    images, labels, fished = batch_with_one_beyond(attack, victim, sent)
    lonely = slice(fished, fished + 1)
    of_batch, of_one = (
        Observation(params=sent.params, update=gradient(victim, sent.params, x, y), num_examples=len(y))
        for x, y in ((images, labels), (images[lonely], labels[lonely]))
    )
    found, alone = (attack.reconstruct(o, victim, seed=4).inputs[0] for o in (of_batch, of_one))
    start = attack.reconstruct(of_one, victim, seed=5).inputs[0]
    assert (found - alone).abs().mean() < 0.05
    assert (found - alone).abs().mean() < 0.5 * (found - start).abs().mean()


def test_a_share_of_one_fishes_for_all_and_nothing_beyond_is_a_failure() -> None:
    victim = victim_of()
    rows = (LABELS[:400] == 3).nonzero().flatten()[:B]
    everything, nothing = fishing(share=1.0), fishing(share=1e-6)
    for attack, number in ((everything, B), (nothing, 0)):
        sent = attack.tamper(Broadcast(victim, *victim.initial()), seed=1, public=PUBLIC)
        out = beyond(attack, victim, sent, IMAGES[rows])
        kept = rows if number else rows[out == 0]
        update = gradient(victim, sent.params, IMAGES[kept], LABELS[kept])
        found = attack.reconstruct(Observation(params=sent.params, update=update, num_examples=len(kept)), victim)
        if number:
            assert found.inputs.flatten(1).any(1).all()
        else:
            assert found.failure == "the update holds no example beyond the feature's threshold"


def test_only_the_last_layer_changes_and_what_cannot_be_played_is_refused() -> None:
    victim = victim_of()
    params, buffers = victim.initial()
    sent = fishing().tamper(Broadcast(victim, params, buffers), seed=1, public=PUBLIC)
    assert {k for k in params if not torch.equal(params[k], sent.params[k])} == {"fc.weight", "fc.bias"}
    assert int(sent.params["fc.weight"].count_nonzero()) == int(sent.params["fc.bias"].count_nonzero()) == 1
    headless = dataclasses.replace(victim, module=torch.nn.Flatten())
    with pytest.raises(IncompatibleError, match="ends in a linear layer with a bias"):
        fishing().check_victim(headless)
    with pytest.raises(IncompatibleError, match="the model has 10 classes"):
        fishing(target_class=10).check_victim(victim)
    for change in ({"share": 0.0}, {"fish": "cod"}, {"feature_multiplier": 0.0}, {"num_public": 1}):
        with pytest.raises(ConfigError, match="attack"):
            fishing(**change)
