"""The codec of updates without zeros."""

from __future__ import annotations

from typing import final

from gia_bench.errors import WireError
from gia_bench.values import Params, Payload, Shared, Update


@final
class Dense:
    """Every entry, as it is."""

    def encode(self, update: Update, shared: Shared, num_examples: int) -> Payload:
        """The tensors themselves, in the order of their sorted names."""
        return Payload("dense", tuple(update[name] for name in sorted(update)), num_examples)

    def decode(self, payload: Payload, like: Params, shared: Shared) -> Update:
        """The same tensors by name. Raises ``WireError`` where they do not fit ``like``."""
        if len(payload.tensors) != len(like):
            raise WireError(
                f"A dense payload holds {len(payload.tensors)} tensors, but the model has {len(like)}; "
                "encode one update tensor per parameter."
            )
        sent = dict(zip(sorted(like), payload.tensors, strict=True))
        for name, param in like.items():
            if sent[name].shape != param.shape or sent[name].dtype != param.dtype:
                raise WireError(
                    f"A dense payload holds {sent[name].dtype} {list(sent[name].shape)} for {name!r}, but the model "
                    f"has {param.dtype} {list(param.shape)}; encode updates of the parameters' shapes and dtypes."
                )
        return {name: sent[name] for name in like}


DENSE = Dense()
