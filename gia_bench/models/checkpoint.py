"""Trained weights from a file: read without running code that may hide in it, and checked before use."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gia_bench.errors import DataError

# what torch's readers raise for files that are cut short, are not checkpoints, or hold more than tensors
UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
)


def load_checkpoint(module: nn.Module, path: str | Path) -> None:
    """Fill ``module`` with the weights in the file ``path``.

    The file holds a state dict, bare or under ``state_dict`` (a Lightning checkpoint). Names may carry a prefix in
    front of the module's own (``module.``, ``network.``); what does not carry it is then ignored. Raises
    ``DataError`` if the file is absent, corrupt, or holds other names, shapes or non-finite numbers; the module
    is then as it was.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"model.checkpoint: there is no file {path}.")
    found = _tensors(read_weights(path), path)
    wanted = module.state_dict()
    state = _without_prefix(found, wanted, path)
    for name, tensor in state.items():
        ours = wanted[name].shape
        if tensor.shape != ours:
            raise DataError(
                f"model.checkpoint: {name} has the shape {list(tensor.shape)} in {path}, {list(ours)} in the model; "
                "do the number of classes, the image shape and the model's fields agree?"
            )
        if not torch.isfinite(tensor).all():
            raise DataError(f"model.checkpoint: {name} in {path} holds NaN or infinity.")
    module.load_state_dict({**wanted, **state})


def read_weights(path: Path) -> Any:
    """What ``torch.load`` finds in the file, tensors on the CPU and no code run. Raises ``DataError``."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise DataError(
            f"model.checkpoint: {path} is corrupt, or holds more than tensors and plain values "
            f"({type(error).__name__}: {reason}); save it again as torch.save(model.state_dict(), path)."
        ) from error


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    found = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not found:
        raise DataError(f"model.checkpoint: {path} holds no state dict, that is, no tensors by parameter name.")
    return found


def _without_prefix(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    prefixes = {""} | {name[: i + 1] for name in found for i, letter in enumerate(name) if letter == "."}
    candidates = [
        {k.removeprefix(p): v for k, v in found.items() if k.startswith(p)} for p in sorted(prefixes, key=len)
    ]
    # files older than torch 0.4.1 lack BatchNorm's counter, which only a cumulative average (momentum: null) reads
    required = {k for k in wanted if not k.endswith("num_batches_tracked")}
    best = min(candidates, key=lambda state: len(required ^ state.keys()))
    missing, unknown = sorted(required - best.keys()), sorted(best.keys() - wanted.keys())
    if missing or unknown:
        raise DataError(
            f"model.checkpoint: {path} is of another model: it lacks {_some(missing)} and has {_some(unknown)} more."
        )
    return best


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "nothing"
