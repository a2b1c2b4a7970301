"""The codec of updates on masks that everybody knows, with what clients send beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.errors import WireError
from gia_bench.values import Params, Payload, Shared, Update
from gia_bench.wire.aligned import MASK
from gia_bench.wire.bits import bits_of, packed_bits, unpacked_bits
from gia_bench.wire.codec import Codec

EVIDENCE = "evidence."
"""``sent["evidence.<parameter>"]``: what a client tells the server of a parameter beside its update."""
NAME = "kept "


@final
@dataclass(frozen=True)
class Kept:
    """The entries on the mask alone, packed by another codec as if the tensors held nothing else.

    ``shared["mask.<parameter>"]`` (bool, of the parameter's shape) says which entries those are; a parameter without
    one is sent whole. A bool ``evidence.<parameter>`` is a client's own mask: it travels as a bit per entry, and only
    what lies on both masks is sent. Any other evidence travels as it is. ``payload.tensors``: the evidence by sorted
    names, then the other codec's.
    """

    codec: Codec

    def encode(self, update: Update, shared: Shared, num_examples: int) -> Payload:
        """The entries on the masks. Raises ``WireError`` if anything but zero bits lies off them."""
        evidence = {k: v for k, v in update.items() if k.startswith(EVIDENCE)}
        compact: Update = {}
        for name in update.keys() - evidence.keys():
            kept = _places(name, update[name], evidence, shared)
            if kept is None:
                compact[name] = update[name]
                continue
            if bits_of(update[name]).masked_fill(kept, 0).any():
                raise WireError(
                    f"The update has values off the mask in {name!r}; send only what the mask shows, or use the sparse "
                    "codec."
                )
            compact[name] = update[name][kept]
        inner = self.codec.encode(compact, shared, num_examples)
        told = [packed_bits(v) if v.dtype == torch.bool else v for _, v in sorted(evidence.items())]
        return Payload(NAME + inner.codec, (*told, *inner.tensors), num_examples)

    def decode(self, payload: Payload, like: Params, shared: Shared) -> Update:
        """The update as it was. Raises ``WireError`` where payload, masks and ``like`` do not fit."""
        names = sorted(k for k in like if k.startswith(EVIDENCE))
        if not payload.codec.startswith(NAME) or len(payload.tensors) < len(names):
            raise WireError(
                f"A {payload.codec} payload of {len(payload.tensors)} tensors is not one of kept entries with "
                f"{len(names)} tensors of evidence; decode it with the codec and the round of its encoder."
            )
        told = payload.tensors[: len(names)]
        evidence = {name: _told(name, packed, like[name]) for name, packed in zip(names, told, strict=True)}
        weights = {k: v for k, v in like.items() if k not in evidence}
        places = {k: _places(k, v, evidence, shared) for k, v in weights.items()}
        smaller = {k: v if (kept := places[k]) is None else v[kept] for k, v in weights.items()}
        inner = Payload(payload.codec.removeprefix(NAME), payload.tensors[len(names) :], payload.num_examples)
        update = self.codec.decode(inner, smaller, shared)
        for name, kept in places.items():
            if kept is not None:
                update[name] = torch.zeros_like(like[name]).masked_scatter_(kept, update[name])
        return {name: update[name] for name in weights} | evidence

    def places(self, like: Params, shared: Shared) -> dict[str, Tensor]:
        """The announced masks; a client's own is not known before it has sent."""
        masks = {name: _places(name, like[name], {}, shared) for name in like}
        return {name: mask for name, mask in masks.items() if mask is not None}


def _told(name: str, packed: Tensor, like: Tensor) -> Tensor:
    bits = like.dtype == torch.bool
    fits = packed.numel() == -(-like.numel() // 8) and packed.dtype == torch.uint8
    if not (fits if bits else packed.shape == like.shape and packed.dtype == like.dtype):
        raise WireError(
            f"A payload holds {packed.dtype} {list(packed.shape)} for {name!r}, but {like.dtype} {list(like.shape)} "
            "was asked for; decode it with the announcement of its encoder."
        )
    return unpacked_bits(packed, like.numel()).view(like.shape) if bits else packed


def _places(name: str, like: Tensor, evidence: Update, shared: Shared) -> Tensor | None:
    """Where ``name`` has entries on the wire; None for everywhere."""
    masks = [m for m in (shared.get(MASK + name), evidence.get(EVIDENCE + name)) if m is not None]
    masks = [m for m in masks if m.dtype == torch.bool]
    if any(m.shape != like.shape for m in masks):
        raise WireError(
            f"The masks of {name!r} have the shapes {[list(m.shape) for m in masks]}, but the parameter "
            f"{list(like.shape)}; announce masks of the parameters' shapes."
        )
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]
