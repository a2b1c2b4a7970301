from __future__ import annotations

import pytest
import torch

from gia_bench.data.digits import digits
from gia_bench.data.split import stratified
from gia_bench.errors import ConfigError, DataError


def test_the_digits_are_split_into_1437_and_360_with_every_class_in_its_share() -> None:
    data = digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    counts = torch.bincount(data.train.labels) + torch.bincount(data.test.labels)
    share = torch.bincount(data.test.labels) / counts
    assert (share - 360 / 1797).abs().max() < 1 / 170
    assert data.shape == (1, 16, 16)
    assert data.unfit_targets == frozenset()


def test_the_digits_are_the_same_each_time() -> None:
    assert digits().version == digits().version
    assert digits(size=8).version != digits().version


def test_the_digits_fill_0_to_1() -> None:
    images = digits(size=8).train.images(torch.arange(1437))
    assert (images.min().item(), images.max().item()) == (0, 1)


def test_digits_refuse_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.size=7"):
        digits(size=7)
    with pytest.raises(ConfigError, match=r"dataset\.test_fraction=1"):
        digits(test_fraction=1.0)


def test_a_split_is_disjoint_and_whole_even_with_one_example_per_class() -> None:
    train, test = stratified(torch.arange(10), 0.25, "made")
    assert len(test) == 3
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(10))


def test_too_few_examples_for_a_split_are_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        stratified(torch.zeros(1, dtype=torch.int64), 0.5, "made")
