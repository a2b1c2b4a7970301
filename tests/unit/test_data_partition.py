from __future__ import annotations

from typing import Any

import pytest
import torch

from gia_bench.data.partition import ByWriter, ClassesPerClient, Dirichlet, Iid, Scheme
from gia_bench.errors import ConfigError

LABELS = torch.arange(5).repeat(10)


@pytest.mark.parametrize(
    ("scheme", "settings", "named"),
    [
        (Iid, {"num_clients": 0}, "num_clients=0"),
        (Iid, {"num_clients": 2, "samples_per_client": 0}, "samples_per_client=0"),
        (Dirichlet, {"num_clients": 2, "alpha": 0.0}, "alpha=0.0"),
        (Dirichlet, {"num_clients": 2, "alpha": -1.0}, "alpha=-1.0"),
        (Dirichlet, {"num_clients": 2, "alpha": float("nan")}, "alpha=nan"),
        (Dirichlet, {"num_clients": 2, "alpha": float("inf")}, "alpha=inf"),
        (Dirichlet, {"num_clients": 2, "alpha": 1.0, "min_examples": 0}, "min_examples=0"),
        (ClassesPerClient, {"num_clients": 0, "classes_per_client": 1, "samples_per_class": [1, 2]}, "num_clients=0"),
        (ClassesPerClient, {"num_clients": 1, "classes_per_client": 0, "samples_per_class": [1, 2]}, "per_client=0"),
        (ClassesPerClient, {"num_clients": 1, "classes_per_client": 1, "samples_per_class": [0, 2]}, r"\[0, 2\]"),
        (ClassesPerClient, {"num_clients": 1, "classes_per_client": 1, "samples_per_class": [3, 2]}, r"\[3, 2\]"),
        (ClassesPerClient, {"num_clients": 1, "classes_per_client": 1, "samples_per_class": [3]}, r"\[3\]"),
        (ByWriter, {"num_clients": 0}, "num_clients=0"),
    ],
)
def test_a_setting_out_of_range_is_named(scheme: Any, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        scheme(**settings)


@pytest.mark.parametrize(
    ("scheme", "way_out"),
    [
        (Iid(num_clients=51), r"lower partition\.num_clients"),
        (
            Iid(num_clients=5, samples_per_client=11),
            r"need 55, but the data has 50 .* or partition\.samples_per_client",
        ),
        (Dirichlet(num_clients=6, alpha=1.0, min_examples=9), r"or partition\.min_examples"),
        (Dirichlet(num_clients=10, alpha=0.001, min_examples=3), r"raise partition\.alpha"),
        (ClassesPerClient(num_clients=2, classes_per_client=6, samples_per_class=[1, 1]), "the data's 5 classes"),
        (ClassesPerClient(num_clients=30, classes_per_client=2, samples_per_class=[1, 10]), "The data is used up"),
        (ByWriter(), "dataset=femnist"),
    ],
)
def test_data_that_does_not_suffice_is_told_with_the_way_out(scheme: Scheme, way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out):
        scheme.split(LABELS, None, 0)


def test_more_clients_than_writers_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than the data's 3 writers"):
        ByWriter(num_clients=4).split(LABELS, torch.arange(50) % 3, 0)
