"""Labels read off real updates of a small network on real digits, and off updates whose labels follow by hand."""

from __future__ import annotations

import dataclasses
from statistics import mean

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gia_bench.attacks.label_inference import bias_corrected, bias_gradient, gradinversion, idlg, ilrg, llg
from gia_bench.attacks.labels import METHODS, accuracy, auto
from gia_bench.errors import IncompatibleError
from gia_bench.federated.local import FedAvg
from gia_bench.models.functional import Victim
from gia_bench.models.mlp import mlp
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Observation

INFERRED = ("bias_gradient", "bias_corrected", "llg", "ilrg", "gradinversion")


def network(activation: str = "relu") -> Victim:
    with seeded(0, "labels"):
        return Victim(
            module=mlp((1, 8, 8), 10, hidden=(64,), activation=activation), input_shape=(1, 8, 8), num_classes=10
        )


def observe(victim: Victim, size: int, trial: int, *, distinct: bool = False) -> tuple[Observation, Tensor]:
    """The gradient of ``size`` random digits, and their labels. distinct: no label twice."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=stream(trial, "batch"))
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    if distinct:
        order = torch.stack([order[labels == c][0] for c in range(10)])[
            torch.randperm(10, generator=stream(trial, "classes"))[:size]
        ]
    chosen = order[:size]
    images = torch.tensor(data.images, dtype=torch.float32)[chosen, None] / 16
    truth = torch.tensor(data.target, dtype=torch.int64)[chosen]
    params, _ = victim.initial()
    batch = Batch(images, truth, torch.ones(size))
    update = torch.func.grad(lambda p: victim.objective(p, {}, batch)[0])(params)
    return Observation(params=params, update=update, num_examples=size), truth


def measured(method: str, victim: Victim, size: int, trials: int = 6, *, distinct: bool = False) -> float:
    seen = [observe(victim, size, trial, distinct=distinct) for trial in range(trials)]
    found = [METHODS[method](o, victim) for o, _ in seen]
    return mean(accuracy(f, truth) for f, (_, truth) in zip(found, seen, strict=True) if f is not None)


@pytest.mark.parametrize("method", ["idlg", *INFERRED])
def test_the_label_of_one_example_is_certain_where_activations_are_not_negative(method: str) -> None:
    assert measured(method, network(), 1) == 1


@pytest.mark.parametrize("method", ["bias_gradient", "bias_corrected", "ilrg"])
def test_methods_that_read_the_bias_do_not_need_the_activations_sign(method: str) -> None:
    assert measured(method, network("tanh"), 1) == 1
    assert measured("idlg", network("tanh"), 1) < 0.5


@pytest.mark.parametrize("method", ["bias_corrected", "llg", "ilrg"])
def test_counting_methods_find_small_batches_with_repeated_labels(method: str) -> None:
    victim = network()
    batches = [observe(victim, 6, trial)[1] for trial in range(6)]
    assert any(len(set(y.tolist())) < 6 for y in batches)
    assert measured(method, victim, 6) > 0.9


def test_ilrg_counts_more_examples_than_classes_and_the_others_count_them_worse() -> None:
    victim = network()
    found = {m: measured(m, victim, 32) for m in ("ilrg", "bias_corrected", "llg")}
    assert found["ilrg"] > 0.85
    assert found["ilrg"] > max(found["bias_corrected"], found["llg"]) + 0.1


def test_auto_counts_where_it_can_and_takes_the_certain_label_of_one_example() -> None:
    victim = network()
    assert victim.head is not None
    o, truth = observe(victim, 32, 0)
    found = {m: METHODS[m](o, victim) for m in ("auto", "ilrg", "bias_corrected")}
    assert torch.equal(*(found[m] for m in ("auto", "ilrg")))  # type: ignore[arg-type]
    assert not torch.equal(*(found[m] for m in ("auto", "bias_corrected")))  # type: ignore[arg-type]
    assert torch.equal(auto(dataclasses.replace(o, labels=truth), victim), truth)
    for hidden in victim.head:
        part = dataclasses.replace(o, update={k: v for k, v in o.update.items() if k != hidden})
        assert torch.equal(auto(part, victim), bias_corrected(part, victim))
    one, truth = observe(victim, 1, 0)
    pruned = {**one.update, victim.head.bias or "": one.update[victim.head.bias or ""].clamp(max=0)}
    assert torch.equal(auto(dataclasses.replace(one, update=pruned), victim), truth)


def test_gradinversion_finds_distinct_labels_and_refuses_a_batch_that_must_repeat_one() -> None:
    assert measured("gradinversion", network(), 8, distinct=True) > 0.95
    with pytest.raises(IncompatibleError, match="11 examples of 10 classes; take labels=bias_corrected"):
        gradinversion(observe(network(), 11, 0)[0], network())


def test_ilrg_is_exact_for_any_counts_where_the_model_predicts_every_class_alike() -> None:
    victim = network()
    assert victim.head is not None
    head = victim.module.get_parameter(victim.head.weight), victim.module.get_parameter(victim.head.bias or "")
    for parameter in head:
        nn.init.zeros_(parameter)
    assert measured("ilrg", victim, 50, trials=3) == 1


def test_ilrg_reads_a_fedavg_step_as_it_reads_a_gradient() -> None:
    victim = network()
    o, _ = observe(victim, 16, 0)
    sent = {k: 0.01 * v for k, v in o.update.items()}
    step = dataclasses.replace(o, update=sent, local=FedAvg(learning_rate=0.01, batch_size=None))
    assert torch.equal(ilrg(step, victim), ilrg(o, victim))


def test_methods_by_hand() -> None:
    """Four classes, three examples with labels 1, 1, 3: a head that sees ones and predicts a quarter each."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 4))
    victim = Victim(module=net, input_shape=(1, 1, 2), num_classes=4)
    params = {k: torch.zeros_like(v) for k, v in victim.initial()[0].items()}
    bias = torch.tensor([1 / 4, 1 / 4 - 2 / 3, 1 / 4, 1 / 4 - 1 / 3])
    update = {"1.weight": bias[:, None].expand(4, 2), "1.bias": bias}
    o = Observation(params=params, update=update, num_examples=3)
    assert bias_gradient(o, victim).tolist() == [1, 1, 3]
    assert llg(o, victim).tolist() == [1, 1, 3]
    assert ilrg(o, victim).tolist() == [1, 1, 3]
    assert gradinversion(o, victim).tolist()[-1] == 3
    assert idlg(dataclasses.replace(o, num_examples=1), victim).tolist() == [1]


@pytest.mark.parametrize("method", INFERRED)
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_an_update_that_says_nothing_still_gives_as_many_labels_as_examples(method: str, value: float) -> None:
    victim = network()
    o, _ = observe(victim, 5, 0)
    empty = dataclasses.replace(o, update={k: torch.full_like(v, value) for k, v in o.update.items()})
    found = METHODS[method](empty, victim)
    assert found is not None
    assert found.shape == (5,)
    assert found.dtype == torch.int64
    assert found.tolist() == sorted(found.tolist())


def test_what_is_not_shown_cannot_be_read() -> None:
    victim = network()
    o, _ = observe(victim, 2, 0)
    assert victim.head is not None
    no_bias = dataclasses.replace(o, update={k: v for k, v in o.update.items() if k != victim.head.bias})
    no_weight = dataclasses.replace(o, update={k: v for k, v in o.update.items() if k != victim.head.weight})
    for method in (bias_gradient, ilrg):
        with pytest.raises(IncompatibleError, match="needs the last linear layer's bias"):
            method(no_bias, victim)
    for method in (llg, gradinversion, ilrg):
        with pytest.raises(IncompatibleError, match="no last linear layer"):
            method(no_weight, victim)


def test_label_accuracy_counts_each_label_as_often_as_it_occurs() -> None:
    truth = torch.tensor([3, 1, 1, 2])
    assert accuracy(torch.tensor([1, 1, 2, 3]), truth) == 1
    assert accuracy(torch.tensor([1, 2, 2, 2]), truth) == 0.5
    assert accuracy(torch.tensor([0, 0, 0, 0]), truth) == 0
