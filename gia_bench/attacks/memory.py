"""How many candidates fit into memory at once: one is evaluated and its tensors are counted.

Nothing here changes a result: chunks of any size give the same numbers, up to the order of additions within a kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gia_bench.errors import ConfigError

SHARE = 0.5
"""Of the free memory that a chunk may fill: the rest is for the optimiser's state, for what a kernel takes on its own,
which is not counted, and for others (gia_bench choice)."""


@final
class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered: ``peak``, the most bytes that tensors made inside were alive at one time, on any device.

    It counts tensors, not what a kernel takes for itself, so that the same call gives the same number on any machine.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._alive: int = 0
        self._seen: dict[int, ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        known = {id(s) for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in known and id(storage) not in self._seen:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            del self._seen[key]
            self._alive -= size

        self._seen[key] = ref(storage, gone)
        self._alive += size
        self.peak = max(self.peak, self._alive)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors that ``call`` has alive at one time, beside those that were there before."""
    counted = Counted()
    with counted:
        call()
    return counted.peak


def free_bytes(device: torch.device) -> int:
    """What the device, or for the CPU the whole machine, has left now. ``ConfigError`` where it does not say.

    A limit that a container or a batch system sets for one job is not known here: give a number there.
    """
    if device.type == "cuda":
        kept: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        left: int = torch.cuda.mem_get_info(device)[0]
        return left + kept  # what torch keeps for its next tensors is free to them
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    raise ConfigError(
        f"attack.max_batch='auto': a {device.type} device on this system does not say how much memory is free; "
        "give a number, or null for all candidates at once."
    )


def largest_batch(one: int, free: int) -> int:
    """How many candidates of ``one`` byte count each may be evaluated at once with ``free`` bytes left; at least 1."""
    return max(1, int(SHARE * free) // max(one, 1))


def _storages(parts: object) -> list[torch.UntypedStorage]:
    if isinstance(parts, Tensor):
        return [parts.untyped_storage()]
    if isinstance(parts, Mapping):
        return _storages(list(parts.values()))
    if isinstance(parts, list | tuple):
        return [storage for part in parts for storage in _storages(part)]
    return []
