"""What a codec is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gia_bench.errors import WireError
from gia_bench.rows import cut
from gia_bench.values import Params, Payload, Shared, Update


class Codec(Protocol):
    """``decode(encode(u)) == u`` bit for bit; bytes are those of the packed tensors.

    The order of names in ``update`` and ``like`` does not matter: codecs pack in the order of the sorted names.
    """

    def encode(self, update: Update, shared: Shared, num_examples: int) -> Payload:
        """Pack one client's update."""
        ...

    def decode(self, payload: Payload, like: Params, shared: Shared) -> Update:
        """The update as it was; ``like`` gives names, shapes and dtypes."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A codec of values that lie where everybody knows already."""

    def places(self, like: Params, shared: Shared) -> dict[str, Tensor]:
        """By name, where (bool, of the tensor's shape); tensors without an entry have values everywhere."""
        ...


def places(codec: Codec, like: Params, shared: Shared) -> dict[str, Tensor]:
    """Where the codec's values lie, as far as everybody knows it before any client has sent."""
    return codec.places(like, shared) if isinstance(codec, Placed) else {}


def placed(values: Tensor, kept: Tensor, like: Params, names: list[str]) -> Update:
    """``values`` at the places where ``kept`` is set in the row of the named tensors, zero elsewhere.

    Raises ``WireError`` where there are not as many values as places.
    """
    places = int(kept.count_nonzero())
    if places != values.numel():
        raise WireError(
            f"A payload holds {values.numel()} values for {places} places; decode it with the model and the mask "
            "that it was encoded with."
        )
    row = torch.zeros(kept.shape, dtype=values.dtype, device=values.device).masked_scatter_(kept, values)
    return cut(row, {name: like[name] for name in names})


def names_by_dtype(update: Update) -> dict[torch.dtype, list[str]]:
    """Sorted names, grouped by the dtype of their tensors: a group is packed as one vector, with few operations."""
    groups: dict[torch.dtype, list[str]] = {}
    for name in sorted(update):
        groups.setdefault(update[name].dtype, []).append(name)
    return groups
