"""The codec of updates with zeros: what is not zero, and where it stands."""

from __future__ import annotations

from enum import IntEnum
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from gia_bench.errors import WireError
from gia_bench.rows import joined
from gia_bench.values import Params, Payload, Shared, Update
from gia_bench.wire.bits import bits_of, packed_bits, unpacked_bits
from gia_bench.wire.codec import names_by_dtype, placed


class Form(IntEnum):
    """How the positions of one tensor's values are packed."""

    DENSE = 0
    INDICES = 1
    BITMAP = 2


def smallest_form(num_entries: int, num_nonzero: int, entry_bytes: int) -> Form:
    """The form with the fewest bits: every entry | an int32 index per value | a bit per entry. Ties: as listed."""
    value_bits = 8 * entry_bytes
    bits = {
        Form.DENSE: num_entries * value_bits,
        Form.INDICES: num_nonzero * (value_bits + 32),
        Form.BITMAP: num_nonzero * value_bits + num_entries,
    }
    return min(bits, key=lambda form: bits[form])


@final
class Sparse:
    """Per tensor the smallest of an index list, a bitmap and the dense form; zero is the all-zero bit pattern.

    ``payload.tensors``: header int32 [tensors, 2] (form, number of values); indices int32; bitmap uint8 (all bitmap
    tensors' bits in one row); then the values, one vector per dtype. Tensors stand by dtype, then by name, and have
    fewer than 2**31 entries each.
    """

    def encode(self, update: Update, shared: Shared, num_examples: int) -> Payload:
        """The non-zero entries and their positions."""
        header: list[tuple[Form, int]] = []
        indices: list[Tensor] = []
        bitmap: list[Tensor] = []
        values: list[Tensor] = []
        for dtype, names in names_by_dtype(update).items():
            row = joined(update, names).detach()
            sizes = [update[name].numel() for name in names]
            kept = bits_of(row) != 0
            parts = kept.split_with_sizes(sizes)
            # counted together and read once: reading each would wait for the device once per tensor
            counts = torch.stack([part.count_nonzero() for part in parts]).tolist()
            forms = [smallest_form(n, c, dtype.itemsize) for n, c in zip(sizes, counts, strict=True)]
            for i, form in enumerate(forms):
                if form is Form.DENSE:
                    parts[i].fill_(True)
                    counts[i] = sizes[i]
            header += zip(forms, counts, strict=True)
            positions = kept.nonzero().view(-1)
            values.append(row[positions])
            starts = accumulate(sizes[:-1], initial=0)
            for form, part, start, where in zip(forms, parts, starts, positions.split_with_sizes(counts), strict=True):
                if form is Form.INDICES:
                    indices.append((where - start).int())
                elif form is Form.BITMAP:
                    bitmap.append(part)
        device = values[0].device if values else torch.device("cpu")
        head = torch.tensor(header, dtype=torch.int32).view(-1, 2).to(device)
        bits = packed_bits(_joined(bitmap, torch.bool, device))
        return Payload("sparse", (head, _joined(indices, torch.int32, device), bits, *values), num_examples)

    def decode(self, payload: Payload, like: Params, shared: Shared) -> Update:
        """The update as it was. Raises ``WireError`` where the payload does not fit ``like``."""
        groups = names_by_dtype(like)
        head, indices, bitmap, *values = payload.tensors
        if head.shape[0] != len(like) or [v.dtype for v in values] != list(groups):
            raise WireError(
                f"A sparse payload holds {head.shape[0]} tensors of {[v.dtype for v in values]}, but the model has "
                f"{len(like)} of {list(groups)}; encode updates of the parameters' names and dtypes."
            )
        sizes = [like[name].numel() for names in groups.values() for name in names]
        kept = torch.zeros(sum(sizes), dtype=torch.bool, device=head.device)
        positions, bits = indices.long(), unpacked_bits(bitmap, 8 * bitmap.numel())
        for part, (form, count) in zip(kept.split_with_sizes(sizes), head.tolist(), strict=True):
            if form == Form.DENSE:
                part.fill_(True)
            elif form == Form.INDICES:
                part[positions[:count]] = True
                positions = positions[count:]
            else:
                part.copy_(bits[: part.numel()])
                bits = bits[part.numel() :]
        update: Update = {}
        lengths = [sum(like[name].numel() for name in names) for names in groups.values()]
        for names, sent, where in zip(groups.values(), values, kept.split_with_sizes(lengths), strict=True):
            update |= placed(sent, where, like, names)
        return {name: update[name] for name in like}


def _joined(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype, device=device), *parts])


SPARSE = Sparse()
