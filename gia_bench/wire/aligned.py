"""The codec of updates whose positions everybody knows already."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from gia_bench.errors import WireError
from gia_bench.rows import joined
from gia_bench.values import Params, Payload, Shared, Update
from gia_bench.wire.bits import bits_of
from gia_bench.wire.codec import names_by_dtype, placed

MASK = "mask."
"""``shared["mask.<parameter>"]`` says which entries are sent: bool, of the parameter's shape."""


@final
class Aligned:
    """Values only, one vector per dtype; their positions are the announced mask's."""

    def encode(self, update: Update, shared: Shared, num_examples: int) -> Payload:
        """The entries on the mask. Raises ``WireError`` if anything but zero bits lies off it."""
        values = []
        for names in names_by_dtype(update).values():
            row, mask = joined(update, names).detach(), _mask(names, update, shared)
            values.append(row[mask])
            if bits_of(row).masked_fill(mask, 0).any():
                off = [name for name in names if bits_of(update[name])[~shared[MASK + name]].any()]
                raise WireError(
                    f"The update has values off the announced mask in {off}; "
                    "send only what the mask shows, or use the sparse codec."
                )
        return Payload("aligned", tuple(values), num_examples)

    def decode(self, payload: Payload, like: Params, shared: Shared) -> Update:
        """The update as it was. Raises ``WireError`` where payload, mask and ``like`` do not fit."""
        groups = names_by_dtype(like)
        if [v.dtype for v in payload.tensors] != list(groups):
            raise WireError(
                f"An aligned payload holds {[v.dtype for v in payload.tensors]}, but the model's dtypes are "
                f"{list(groups)}; encode updates of the parameters' dtypes."
            )
        update: Update = {}
        for names, sent in zip(groups.values(), payload.tensors, strict=True):
            update |= placed(sent, _mask(names, like, shared), like, names)
        return {name: update[name] for name in like}

    def places(self, like: Params, shared: Shared) -> dict[str, Tensor]:
        """The announced mask."""
        return {name: _mask([name], like, shared).view(like[name].shape) for name in like}


def _mask(names: list[str], like: Params, shared: Shared) -> Tensor:
    for name in names:
        mask = shared.get(MASK + name)
        if mask is None or mask.dtype != torch.bool or mask.shape != like[name].shape:
            got = "none" if mask is None else f"{mask.dtype} {list(mask.shape)}"
            raise WireError(
                f"The aligned codec needs a bool mask of shape {list(like[name].shape)} for {name!r}, got {got}; "
                "use it with a defense that announces one (adgp)."
            )
    return joined(shared, [MASK + name for name in names])


ALIGNED = Aligned()
