from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gia_bench.errors import DataError
from gia_bench.models.build import build_victim
from gia_bench.models.checkpoint import load_checkpoint
from gia_bench.models.functional import Victim
from gia_bench.models.resnet import cifar_resnet

NETWORK = partial(cifar_resnet, depth=8, width=2)


def build(seed: int, checkpoint: Path | None = None, classes: int = 3) -> Victim:
    return build_victim(
        NETWORK, input_shape=(1, 8, 8), num_classes=classes, mean=[0], std=[1], seed=seed, checkpoint=checkpoint
    )


def trained() -> dict[str, torch.Tensor]:
    """A model whose statistics have moved."""
    state = build(seed=1).module.state_dict()
    return {k: v + 1 if "running" in k else v for k, v in state.items()}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in trained().items()}


@pytest.mark.parametrize(
    "content",
    [
        trained(),
        {"state_dict": trained(), "best_prec1": 91.7},
        {"state_dict": prefixed("module."), "epoch": 3},
        {"state_dict": prefixed("network.") | {"aggregate": torch.ones(4)}, "pytorch-lightning_version": "2.6"},
        prefixed("module.network."),
    ],
    ids=["bare", "state_dict", "data_parallel", "lightning", "both"],
)
def test_weights_load_whatever_is_wrapped_around_them(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    loaded = build(seed=2, checkpoint=tmp_path / "weights.pt").module.state_dict()
    assert loaded.keys() == trained().keys()
    assert all(torch.equal(loaded[k], v) for k, v in trained().items())


def test_files_from_before_batch_norm_counted_still_load(tmp_path: Path) -> None:
    old = {k: v for k, v in trained().items() if "num_batches" not in k}
    torch.save(old, tmp_path / "weights.pt")
    loaded = build(seed=2, checkpoint=tmp_path / "weights.pt").module.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in old.items())


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("linear.weight"), r"lacks 1 tensors \(linear.weight\) and has nothing more"),
        (without("conv1.weight"), r"lacks 1 tensors \(conv1.weight\)"),
        (lambda state: state | {"extra": torch.ones(1)}, r"lacks nothing and has 1 tensors \(extra\) more"),
        (lambda state: {f"{k}.other": v for k, v in state.items()}, "of another model"),
        (lambda state: state | {"linear.bias": torch.ones(9)}, r"linear.bias has the shape \[9\] in .* \[3\] in the"),
        (lambda state: state | {"linear.bias": torch.full((3,), torch.nan)}, "linear.bias .* holds NaN or infinity"),
        (lambda state: {"epoch": 3}, "holds no state dict"),
        (lambda state: [1, 2], "holds no state dict"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_loaded(
    damage: Callable[[dict[str, Any]], Any], says: str, tmp_path: Path
) -> None:
    torch.save(damage(trained()), tmp_path / "weights.pt")
    module = build(seed=2).module
    with pytest.raises(DataError, match=says):
        load_checkpoint(module, tmp_path / "weights.pt")
    untouched = build(seed=2).module.state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in module.state_dict().items())


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*absent\.pt"):
        build(seed=0, checkpoint=tmp_path / "absent.pt")
    with pytest.raises(DataError, match="there is no file"):
        build(seed=0, checkpoint=tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_called_corrupt(share: float, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(trained(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match="is corrupt"):
        build(seed=0, checkpoint=path)


@pytest.mark.parametrize(
    "content", [b"not a checkpoint", bytes(range(256)) * 8, b"PK\x03\x04" + bytes(500), b"\x80\x02."]
)
def test_a_file_of_something_else_is_called_corrupt(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(DataError, match="is corrupt"):
        build(seed=0, checkpoint=tmp_path / "weights.pt")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(DataError, match="holds more than tensors"):
        build(seed=0, checkpoint=tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()
    # the trap does work where code is allowed to run
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_other_dtypes_are_converted_to_the_models(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    torch.save({k: v.double() for k, v in nn.Linear(2, 2).state_dict().items()}, tmp_path / "weights.pt")
    load_checkpoint(module, tmp_path / "weights.pt")
    assert module.weight.dtype == torch.float32
