"""Simulated local steps against what a client really does, and the attacks that match them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_problems import Problem, problem, psnr_db
from torch import Tensor, nn

from gia_bench.attacks.distances import Cosine
from gia_bench.attacks.graddefense import dga, gia
from gia_bench.attacks.group import Group
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.replay import EpochAverage, LocalSteps, OneStep, Replay
from gia_bench.attacks.scene import Candidate, PixelSpace, Scene, update_unit
from gia_bench.defenses.none import NoDefense
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Observation, Update

LOCALS: dict[str, LocalWork] = {
    "fedsgd": FedSGD(batch_size=None),
    "one_step": FedAvg(learning_rate=0.3, batch_size=None),
    "two_passes_of_one_step": FedAvg(learning_rate=0.3, epochs=2, batch_size=None),
    "dividing": FedAvg(learning_rate=0.3, epochs=2, batch_size=3),
    "ragged": FedAvg(learning_rate=0.3, epochs=2, batch_size=4, momentum=0.9, weight_decay=0.01),
    "steps": FedAvg(learning_rate=0.3, epochs=None, steps=4, batch_size=4, momentum=0.5),
}
N = 6


def data(seed: int = 0, count: int = N) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=draw, dtype=torch.float64)
    return Batch(images, torch.randint(4, (count,), generator=draw), torch.ones(count, dtype=torch.float64))


def model(*, batch_norm: bool = False) -> Victim:
    return problem(1, norm=nn.BatchNorm2d(4) if batch_norm else None, dtype=torch.float64).victim


def sent(victim: Victim, local: LocalWork, held: Batch, seed: int) -> tuple[Update, list[Tensor]]:
    """A client's own run, padded as in a cohort, and the positions that its steps used."""
    steps = local.schedule(len(held.mask), seed, 0, 0)
    padded = torch.zeros(len(steps), max(map(len, steps)), dtype=torch.int64)
    mask = torch.zeros(padded.shape, dtype=torch.float64)
    for s, step in enumerate(steps):
        padded[s, : len(step)], mask[s, : len(step)] = step, 1
    params, buffers = victim.initial()
    batch = Batch(held.inputs[padded], held.labels[padded], mask)
    counts = [len(step) for step in steps]
    return local.run(victim, NoDefense(), params, buffers, batch, {}, counts).update, steps


def orders(local: LocalWork, steps: list[Tensor], count: int = N) -> list[Tensor]:
    """Each pass's order, with the places of a pass that stops early filled up by whoever is left."""
    passes, rest = [], list(steps)
    for places in local.plan(count):
        used = torch.cat([rest.pop(0) for _ in places])
        left = [i for i in range(count) if i not in used.tolist()]
        passes.append(torch.cat([used, torch.tensor(left, dtype=torch.int64)]))
    assert not rest
    return passes


def of(held: Batch, order: Tensor) -> Batch:
    return Batch(*(t[order] for t in held))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", LOCALS)
def test_the_same_data_in_the_same_order_give_the_clients_own_update(name: str, batch_norm: bool) -> None:
    local, victim, held = LOCALS[name], model(batch_norm=batch_norm), data()
    update, steps = sent(victim, local, held, seed=3)
    found = local.simulate(victim, *victim.initial(), [of(held, o) for o in orders(local, steps)])
    torch.testing.assert_close(found, update, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOCALS)
def test_the_plan_says_how_many_examples_each_step_of_the_schedule_has_and_nothing_of_whose_they_are(name: str) -> None:
    local = LOCALS[name]
    for count in (4, 5, 6, 8):
        expected = [len(step) for step in local.schedule(count, 0, 0, 0)]
        assert [len(range(count)[place]) for places in local.plan(count) for place in places] == expected


@pytest.mark.parametrize("name", LOCALS)
def test_the_scale_is_the_update_of_a_gradient_that_stays(name: str) -> None:
    """Of a linear loss, written as torch's own optimizer steps."""
    local = LOCALS[name]
    weight = torch.zeros(1, requires_grad=True)
    if isinstance(local, FedAvg):
        optimizer = torch.optim.SGD([weight], lr=local.learning_rate, momentum=local.momentum)
        for _ in local.schedule(N, 0, 0, 0):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step()
        assert local.scale(N) == pytest.approx(-weight.item())
    else:
        assert local.scale(N) == 1


def observed(victim: Victim, local: LocalWork, held: Batch, seed: int = 3, *, labels: bool = True) -> Observation:
    params, buffers = victim.initial()
    return Observation(
        params=params, buffers=buffers, update=sent(victim, local, held, seed)[0], local=local,
        labels=held.labels if labels else None, num_examples=len(held.mask),
    )  # fmt: skip


def group(victim: Victim, seen: list[Observation], replay: Replay, labels: list[Tensor | None]) -> Group:
    space = PixelSpace.of(victim, seen[0].update["0.bias"])
    return Group.of(seen, victim, labels, space, Cosine(), {}, None, None, replay)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("replay", [LocalSteps(), EpochAverage(weight=0.3)])
@pytest.mark.parametrize("joint", [False, True])
def test_the_gradient_through_all_steps_equals_a_loop_of_finite_differences(
    replay: Replay, joint: bool, batch_norm: bool
) -> None:
    """Along random directions, for two victims and two restarts at once."""
    local, victim = FedAvg(learning_rate=0.5, epochs=2, batch_size=2, momentum=0.9), model(batch_norm=batch_norm)
    held = [data(v, 3) for v in range(2)]
    seen = [observed(victim, local, h) for h in held]
    own: list[Tensor | None] = [None if joint else replay.arrange(h.labels, seen[0], 0, 2) for h in held]
    loss_of, draw = group(victim, seen, replay, own), torch.Generator().manual_seed(1)
    B = 3 * replay.copies(seen[0])
    variables = {"pixels": torch.rand(2, 2, B, 1, 8, 8, generator=draw, dtype=torch.float64)}
    if joint:
        variables["labels"] = torch.randn(2, 2, B, 4, generator=draw, dtype=torch.float64)
    _, gradients = loss_of.evaluate(variables)
    for name, value in variables.items():
        direction = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        ends = [loss_of.evaluate({**variables, name: value + e * direction})[0] for e in (1e-5, -1e-5)]
        slope = (gradients[name] * direction).flatten(2).sum(2)
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_loss_at_the_truth_is_zero_by_local_steps_and_not_by_one(batch_norm: bool) -> None:
    """The client's own order is handed in as the order of the guesses: here the passes have one step or one order."""
    local, victim, held = FedAvg(learning_rate=0.5, epochs=1, batch_size=2), model(batch_norm=batch_norm), data(count=4)
    seen = observed(victim, local, held)
    order = torch.cat(local.schedule(4, 3, 0, 0))
    true = {"pixels": of(held, order).inputs[None, None]}
    losses = {
        replay: float(group(victim, [seen], replay, [of(held, order).labels]).evaluate(true)[0])
        for replay in (OneStep(), LocalSteps())
    }
    assert losses[LocalSteps()] < 1e-12
    assert losses[OneStep()] > 1e-6


def test_epochs_of_their_own_reach_zero_at_the_truth_of_a_client_who_shuffles_and_one_order_does_not() -> None:
    local, victim, held = FedAvg(learning_rate=0.5, epochs=2, batch_size=2), model(), data(count=4)
    seen = observed(victim, local, held, seed=0)
    first, second = orders(local, sent(victim, local, held, 0)[1], 4)
    assert {*first[:2].tolist()} not in ({*second[:2].tolist()}, {*second[2:].tolist()})
    both, replay = torch.cat([first, second]), EpochAverage(weight=0.3)
    assert replay.copies(seen) == 2
    own = group(victim, [seen], replay, [held.labels[both]]).evaluate({"pixels": held.inputs[both][None, None]})[0]
    one = group(victim, [seen], LocalSteps(), [held.labels[first]]).evaluate(
        {"pixels": held.inputs[first][None, None]}
    )[0]
    assert float(own) < 1e-12 < 1e-8 < float(one)


def test_the_prior_of_the_epochs_is_the_mean_over_pairs_and_blind_to_order() -> None:
    local, victim = FedAvg(epochs=3, batch_size=2), model()
    scene, replay = Scene(victim, observed(victim, local, data(count=4))), EpochAverage(weight=0.5)
    pixels = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def penalty(x: Tensor) -> float:
        return float(replay.penalty(Candidate(x, x, torch.zeros(12)), scene))

    means = [pixels[4 * e : 4 * e + 4].mean(0) for e in range(3)]
    by_hand = sum(float((a - b).square().mean()) for a in means for b in means) / 9
    assert penalty(pixels) == pytest.approx(0.5 * by_hand)
    shuffled = torch.cat([pixels[4 * e + torch.randperm(4)] for e in range(3)])
    assert penalty(shuffled) == pytest.approx(penalty(pixels))
    assert penalty(torch.cat([pixels[:4], pixels[:4].flip(0), pixels[:4]])) < 1e-12


def test_the_epochs_are_matched_before_they_are_averaged_and_never_across_labels() -> None:
    local, victim = FedAvg(epochs=2, batch_size=2), model()
    seen, replay, held = observed(victim, local, data(count=4)), EpochAverage(), data(count=4)
    order, noise = torch.tensor([2, 0, 3, 1]), 0.01 * torch.randn(4, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 2])
    pixels = torch.cat([held.inputs + noise, (held.inputs - noise)[order]])
    images, own = replay.merge(pixels, torch.cat([labels, labels[order]]), seen)
    torch.testing.assert_close(images, held.inputs)
    assert torch.equal(own, labels)
    same = torch.cat([held.inputs, held.inputs[[1, 0, 2, 3]]])  # alike in pixels, but the labels say otherwise
    images, _ = replay.merge(same, torch.cat([labels, labels]), seen)
    torch.testing.assert_close(images[0], (held.inputs[0] + held.inputs[1]) / 2)
    soft = torch.eye(4, dtype=torch.float64)
    _, beliefs = replay.merge(pixels, torch.cat([soft, soft[order]]), seen)
    torch.testing.assert_close(beliefs, soft)


@pytest.mark.parametrize("replay", [LocalSteps(), EpochAverage()])
def test_the_order_in_which_labels_are_shown_does_not_matter(replay: Replay) -> None:
    """It is that of the client's first pass: whoever used it would know which labels met in a step."""
    local, victim, held = FedAvg(learning_rate=0.5, epochs=2, batch_size=2), model(), data(count=4)
    seen = observed(victim, local, held)
    turned = dataclasses.replace(seen, labels=held.labels.flip(0))
    attack = inverting_gradients(steps=3, restarts=3, labels="known", replay=replay)
    one, two = (attack.reconstruct(o, victim, seed=1) for o in (seen, turned))
    assert torch.equal(one.inputs, two.inputs)
    assert one.labels is not None and sorted(one.labels.tolist()) == sorted(held.labels.tolist())
    drawn = replay.arrange(torch.arange(4), seen, 0, 3)
    assert drawn.shape == (3, 4 * replay.copies(seen))
    assert len(set(map(tuple, drawn.tolist()))) == 3


def test_one_step_and_the_sum_of_several_clients_are_not_simulated_and_need_no_order() -> None:
    victim, held = model(), data(count=4)
    seen = observed(victim, FedAvg(learning_rate=0.5, epochs=2, batch_size=2), held)
    many = dataclasses.replace(seen, num_clients=2)
    plain = observed(victim, FedAvg(learning_rate=0.5, batch_size=None), held)
    for replay in (LocalSteps(), EpochAverage()):
        for o in (many, plain):
            assert torch.equal(replay.arrange(held.labels, o, 0, 3), held.labels[None])
            assert replay.copies(o) == 1
            found, expected = (r.update(held, Scene(victim, o)) for r in (replay, OneStep()))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert update_unit(many) == pytest.approx(0.5 * 2)
    assert update_unit(seen) == pytest.approx(0.5 * 4)


def test_victims_and_restarts_of_local_steps_are_what_they_are_alone() -> None:
    local, victim = FedAvg(learning_rate=0.5, epochs=2, batch_size=2), model()
    seen = [observed(victim, local, data(v, 3)) for v in range(3)]
    attack = inverting_gradients(steps=4, restarts=2, labels="known", max_batch=3)
    together = attack.reconstruct_many(seen, victim, seeds=[0, 1, 2])
    for seed, (found, o) in enumerate(zip(together, seen, strict=True)):
        alone = attack.reconstruct(o, victim, seed=seed)
        torch.testing.assert_close(found.inputs, alone.inputs, rtol=1e-6, atol=1e-8)
        assert found.labels is not None and alone.labels is not None and torch.equal(found.labels, alone.labels)


def alone(p: Problem, local: FedAvg, *, labels: bool) -> list[Observation]:
    """What clients of one image each send after their local steps. labels: whether they are shown."""
    seen = []
    for x, y in zip(p.images, p.labels, strict=True):
        update, _ = sent(p.victim, local, Batch(x, y, torch.ones(1, dtype=torch.float64)), 0)
        shown = y if labels else None
        seen.append(dataclasses.replace(p.observations[0], update=update, labels=shown, local=local))
    return seen


def test_graddefenses_attacks_rebuild_images_behind_two_local_epochs_which_one_step_cannot() -> None:
    """As in GradDefense's federations: two epochs of one step each. Both attacks know the labels."""
    local = FedAvg(learning_rate=0.03, epochs=2, batch_size=None)
    p = problem(2, width=12, dtype=torch.float64)
    seen = alone(p, local, labels=True)
    scores, quality = {}, {}
    for replay in (LocalSteps(), OneStep()):
        loss_of = group(p.victim, seen, replay, list(p.labels))
        scores[replay] = loss_of.evaluate({"pixels": p.images[:, None]})[0].max()
        found = dataclasses.replace(dga(steps=10), replay=replay).reconstruct_many(seen, p.victim, seeds=[0, 1])
        quality[replay] = torch.stack([psnr_db(r.inputs, x)[0] for r, x in zip(found, p.images, strict=True)])
    assert (gia().replay, gia().distance) == (LocalSteps(), Cosine())
    assert scores[LocalSteps()] < 1e-12 < 1e-3 < scores[OneStep()]
    assert quality[LocalSteps()].max() > 40 > quality[OneStep()].max()


@pytest.mark.parametrize("labels", ["auto", "joint"])
def test_behind_several_local_steps_labels_that_are_not_shown_are_found_with_the_image(labels: str) -> None:
    local = FedAvg(learning_rate=0.03, epochs=3, batch_size=None)
    p = problem(4, width=12, dtype=torch.float64)
    seen = alone(p, local, labels=False)
    attack = dataclasses.replace(dga(steps=10), labels=labels, replay=LocalSteps())
    found = attack.reconstruct_many(seen, p.victim, seeds=[0, 1, 2, 3])
    right = [torch.equal(torch.as_tensor(r.labels), y) for r, y in zip(found, p.labels, strict=True)]
    quality = torch.stack([psnr_db(r.inputs, x)[0] for r, x in zip(found, p.images, strict=True)])
    assert all(right) if labels == "auto" else sum(right) >= 2
    assert quality.max() > 40
