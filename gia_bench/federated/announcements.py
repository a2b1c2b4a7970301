"""Who holds what the server has announced: a mask that stays the same travels to each client once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from gia_bench.values import Shared
from gia_bench.wire import shared_bytes


@final
class Announcements:
    """The last announcement, and by name the clients that have it."""

    def __init__(self) -> None:
        self.last: Shared = {}
        self.holders: dict[str, frozenset[int]] = {}

    def tell(self, shared: Shared, clients: Sequence[int]) -> float:
        """Bytes that one of ``clients`` downloads (mean) to hold all of ``shared``; from now on it does."""
        total, holders = 0, {}
        for name, tensor in shared.items():
            held = self.holders[name] if name in self.last and _same(self.last[name], tensor) else frozenset()
            total += shared_bytes({name: tensor}) * sum(c not in held for c in clients)
            holders[name] = held | frozenset(clients)
        self.last, self.holders = dict(shared), holders
        return total / len(clients)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"last": self.last, "holders": {name: sorted(clients) for name, clients in self.holders.items()}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Announcements:
        """From a checkpoint."""
        made = cls()
        made.last = dict(state["last"])
        made.holders = {name: frozenset(clients) for name, clients in state["holders"].items()}
        return made


def _same(before: Tensor, now: Tensor) -> bool:
    if before is now:
        return True
    return before.shape == now.shape and before.dtype == now.dtype and torch.equal(before.to(now.device), now)
