"""A search looks at no value between two snapshots, and leaves nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from attack_problems import problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.gradinversion import gradinversion
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.priors import TotalVariation
from gia_bench.attacks.sgi import sgi

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered: ``count``, how often a tensor's value was asked for, which on a GPU waits for it."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


ATTACKS: dict[str, Callable[[int], GradientMatching]] = {
    "inverting_gradients": lambda steps: inverting_gradients(steps=steps, restarts=2, snapshot_every=1000),
    "sgi": lambda steps: sgi(steps=steps, restarts=2, snapshot_every=1000),
    "gradinversion": lambda steps: gradinversion(steps=steps, restarts=2, priors={}, snapshot_every=1000),
    "stops": lambda steps: inverting_gradients(steps=steps, stop_below=1e-9, snapshot_every=1000),
}


def reads(attack: GradientMatching) -> int:
    p = problem(2)
    with Reads() as counted:
        attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1])
    return counted.count


@pytest.mark.parametrize("name", ATTACKS)
def test_more_steps_ask_for_no_more_values(name: str) -> None:
    """What is asked for at the beginning and at the end is asked for once."""
    few, many = (reads(ATTACKS[name](steps)) for steps in (3, 9))
    assert few == many
    assert few > 0, "else nothing was counted"


def test_lbfgs_asks_once_an_iteration_on_a_cpu_alone() -> None:
    """There waiting costs nothing, and victims that are done need not be computed: the exception that the rule has."""
    few, many = (reads(dlg(steps=steps, optimizer=LBFGS(max_iter=2), snapshot_every=1000)) for steps in (3, 9))
    assert many > few


@pytest.mark.parametrize("weight", [0.0, 1e-2])
def test_dlg_with_searched_labels_takes_a_prior(weight: float) -> None:
    p = problem(2)
    attack = dlg(steps=3, priors={"tv": TotalVariation(weight=weight)})
    for found in attack.reconstruct_many(p.observations, p.victim, seeds=[0, 1]):
        assert found.failure is None and found.inputs.isfinite().all()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_keeps_no_tensor_when_it_is_done(name: str) -> None:
    p = problem(2)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def run() -> None:
        ATTACKS[name](3).reconstruct_many(p.observations, p.victim, seeds=[0, 1])

    run()  # what is made once
    before = alive()
    run()
    assert alive() == before
