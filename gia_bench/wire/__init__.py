"""Codecs: exact inverses between an update and what crosses the wire. Loss happens in ``protect``, never here."""

from gia_bench.wire.aligned import ALIGNED, Aligned
from gia_bench.wire.bits import bits_of, packed_bits, shared_bytes, unpacked_bits
from gia_bench.wire.codec import Codec, places
from gia_bench.wire.dense import DENSE, Dense
from gia_bench.wire.kept import EVIDENCE, Kept
from gia_bench.wire.masked import Layout, Ring
from gia_bench.wire.narrow import Narrow, Packing
from gia_bench.wire.packings import Cast, Codes, Signs
from gia_bench.wire.sparse import SPARSE, Sparse

__all__ = [
    "ALIGNED",
    "DENSE",
    "EVIDENCE",
    "SPARSE",
    "Aligned",
    "Cast",
    "Codec",
    "Codes",
    "Dense",
    "Kept",
    "Layout",
    "Narrow",
    "Packing",
    "Ring",
    "Signs",
    "Sparse",
    "bits_of",
    "packed_bits",
    "places",
    "shared_bytes",
    "unpacked_bits",
]
