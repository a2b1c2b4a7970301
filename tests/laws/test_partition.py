from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gia_bench.data.partition import ByWriter, ClassesPerClient, Dirichlet, Iid, Partition, Scheme
from gia_bench.data.public import Subset, public_examples
from gia_bench.data.source import Dataset, InMemory
from gia_bench.errors import ConfigError, IncompatibleError

SEEDS = st.integers(0, 2**40)


def labels_of(num_examples: int, num_classes: int) -> torch.Tensor:
    return torch.randint(num_classes, (num_examples,), generator=torch.Generator().manual_seed(num_examples))


def writers_of(num_examples: int, num_writers: int) -> torch.Tensor:
    return 3 + torch.randint(num_writers, (num_examples,), generator=torch.Generator().manual_seed(1))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    num_clients, most = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    alpha, least = draw(st.floats(0.3, 50)), draw(st.integers(1, 3))
    kinds: list[Scheme] = [
        Iid(num_clients=num_clients),
        Iid(num_clients=num_clients, samples_per_client=most),
        Dirichlet(num_clients=num_clients, alpha=alpha, min_examples=least),
        ClassesPerClient(num_clients=num_clients, classes_per_client=least, samples_per_class=(1, most)),
        ByWriter(),
        ByWriter(num_clients=min(num_clients, 5)),
    ]
    return kinds[draw(st.integers(0, len(kinds) - 1))]


def same(one: Partition, other: Partition) -> bool:
    return len(one.clients) == len(other.clients) and all(
        torch.equal(a, b) for a, b in zip(one.clients, other.clients, strict=True)
    )


@given(scheme=schemes(), num_examples=st.integers(150, 400), num_classes=st.integers(3, 10), seed=SEEDS)
def test_no_example_is_in_two_clients_and_none_is_empty(
    scheme: Scheme, num_examples: int, num_classes: int, seed: int
) -> None:
    labels, groups = labels_of(num_examples, num_classes), writers_of(num_examples, 8)
    clients = scheme.split(labels, groups, seed).clients
    everything = torch.cat(clients)
    assert len(torch.unique(everything)) == len(everything)
    assert everything.dtype == torch.int64
    assert 0 <= everything.min() <= everything.max() < num_examples
    assert min(len(client) for client in clients) > 0
    assert all(torch.equal(client, client.sort().values) for client in clients)


@given(scheme=schemes(), seed=SEEDS)
def test_the_same_seed_gives_the_same_clients_whatever_was_drawn_before(scheme: Scheme, seed: int) -> None:
    labels, groups = labels_of(300, 7), writers_of(300, 8)
    first = scheme.split(labels, groups, seed)
    Iid(num_clients=3).split(labels, groups, seed + 1)
    assert same(scheme.split(labels, groups, seed), first)


@pytest.mark.parametrize(
    "scheme",
    [
        Iid(num_clients=5),
        Dirichlet(num_clients=5, alpha=0.5),
        ClassesPerClient(num_clients=5, classes_per_client=2, samples_per_class=[1, 10]),
        ByWriter(num_clients=4),
    ],
    ids=lambda scheme: type(scheme).__name__,
)
def test_another_seed_gives_other_clients(scheme: Scheme) -> None:
    labels, groups = labels_of(300, 7), writers_of(300, 8)
    drawn = [scheme.split(labels, groups, seed) for seed in range(5)]
    assert not any(same(one, other) for one, other in pairwise(drawn))


def test_no_partition_touches_the_global_generators() -> None:
    labels, groups = labels_of(300, 7), writers_of(300, 8)
    before = torch.get_rng_state()
    for scheme in (Iid(num_clients=5), Dirichlet(num_clients=5, alpha=1.0), ByWriter(num_clients=2)):
        scheme.split(labels, groups, 0)
    assert torch.equal(torch.get_rng_state(), before)


@given(num_clients=st.integers(1, 40), num_examples=st.integers(40, 200), seed=SEEDS)
def test_iid_uses_everything_in_equal_numbers(num_clients: int, num_examples: int, seed: int) -> None:
    clients = Iid(num_clients=num_clients).split(labels_of(num_examples, 4), None, seed).clients
    sizes = [len(client) for client in clients]
    assert (len(sizes), sum(sizes)) == (num_clients, num_examples)
    assert max(sizes) - min(sizes) <= 1


@given(num_clients=st.integers(1, 10), each=st.integers(1, 12), seed=SEEDS)
def test_iid_gives_each_client_the_number_asked_for(num_clients: int, each: int, seed: int) -> None:
    clients = Iid(num_clients=num_clients, samples_per_client=each).split(labels_of(120, 4), None, seed).clients
    assert [len(client) for client in clients] == [each] * num_clients


@given(alpha=st.floats(0.2, 1000), num_clients=st.integers(1, 8), least=st.integers(1, 12), seed=SEEDS)
def test_dirichlet_uses_everything_and_respects_the_least(
    alpha: float, num_clients: int, least: int, seed: int
) -> None:
    scheme = Dirichlet(num_clients=num_clients, alpha=alpha, min_examples=least)
    clients = scheme.split(labels_of(400, 6), None, seed).clients
    assert sorted(torch.cat(clients).tolist()) == list(range(400))
    assert min(len(client) for client in clients) >= least


def test_a_small_alpha_is_skewed_and_a_large_one_even() -> None:
    labels = torch.arange(10).repeat_interleave(500)

    def largest_share(alpha: float) -> float:
        clients = Dirichlet(num_clients=10, alpha=alpha).split(labels, None, 0).clients
        shares = [torch.bincount(labels[client], minlength=10) / len(client) for client in clients]
        return float(torch.stack(shares).max(1).values.mean())

    assert largest_share(0.1) > 0.5
    assert largest_share(1000.0) < 0.13


@given(
    num_clients=st.integers(1, 60),
    classes=st.integers(1, 4),
    least=st.integers(1, 5),
    more=st.integers(0, 5),
    seed=SEEDS,
)
def test_each_client_has_its_number_of_classes_and_examples_of_each(
    num_clients: int, classes: int, least: int, more: int, seed: int
) -> None:
    assume(num_clients * classes * (least + more) <= 1000)
    labels = torch.arange(10).repeat_interleave(200)
    scheme = ClassesPerClient(
        num_clients=num_clients, classes_per_client=classes, samples_per_class=[least, least + more]
    )
    for client in scheme.split(labels, None, seed).clients:
        counts = torch.bincount(labels[client])
        held = counts[counts > 0]
        assert len(held) == classes
        assert least <= held.min() <= held.max() <= least + more


def test_the_hundred_clients_of_graddefense_fit_into_mnist_and_draw_every_number_and_class() -> None:
    labels = torch.arange(10).repeat_interleave(6000)
    clients = ClassesPerClient(num_clients=100, classes_per_client=2, samples_per_class=[1, 10])
    counts = torch.stack([torch.bincount(labels[c], minlength=10) for c in clients.split(labels, None, 0).clients])
    assert set(counts[counts > 0].tolist()) == set(range(1, 11))
    assert (counts > 0).sum(0).min() > 5


@given(num_clients=st.integers(1, 8), seed=SEEDS)
def test_a_writer_is_never_divided(num_clients: int, seed: int) -> None:
    groups = writers_of(200, 8)
    clients = ByWriter(num_clients=num_clients).split(labels_of(200, 4), groups, seed).clients
    held = [set(groups[client].tolist()) for client in clients]
    assert set.union(*held) == set(groups.tolist())
    assert sum(len(writers) for writers in held) == len(torch.unique(groups))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def dataset(num_examples: int) -> Dataset:
    source = InMemory(torch.zeros(num_examples, 1, 1, 1), torch.arange(num_examples) % 3)
    return Dataset(
        name="made", train=source, test=source, num_classes=3, shape=(1, 1, 1), mean=(0.0,), std=(1.0,), version="none"
    )


@given(num_examples=st.integers(6, 100), seed=SEEDS)
def test_public_training_examples_are_those_that_no_client_holds(num_examples: int, seed: int) -> None:
    data = dataset(num_examples)
    part = Iid(num_clients=2, samples_per_client=2).split(data.train.labels, None, seed)
    public = public_examples(data, part, split="train")
    held = set(torch.cat(part.clients).tolist())
    assert isinstance(public, Subset)
    assert set(public.rows.tolist()) | held == set(range(num_examples))
    assert not set(public.rows.tolist()) & held
    assert torch.equal(public.labels, data.train.labels[public.rows])


def test_a_root_set_that_overlaps_a_client_is_refused() -> None:
    data, part = dataset(6), Partition((torch.tensor([0, 1]), torch.tensor([2])))
    assert len(public_examples(data, part, split="train", indices=[3, 5])) == 2
    assert len(public_examples(data, part, indices=[0, 1])) == 2  # of the test split, which nobody holds
    with pytest.raises(IncompatibleError, match=r"2 training example\(s\) that a client holds \(the first is 1\)"):
        public_examples(data, part, split="train", indices=[3, 1, 2])


def test_public_examples_that_are_not_there_are_named() -> None:
    data, everything = dataset(6), Partition((torch.arange(6),))
    with pytest.raises(IncompatibleError, match="clients hold all of it"):
        public_examples(data, everything, split="train")
    with pytest.raises(ConfigError, match=r"0\.\.5"):
        public_examples(data, everything, indices=[6])
    with pytest.raises(ConfigError, match=r"public\.split"):
        public_examples(data, everything, split="validation")
