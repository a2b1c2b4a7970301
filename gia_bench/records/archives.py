"""Files that ``torch.save`` writes: whether one is whole, and whether writing one failed."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import torch

# what zipfile and torch raise where a flag, a name or an offset is damaged, beside BadZipFile
_DAMAGED = (
    zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error, pickle.UnpicklingError,
)  # fmt: skip
_FOLDER = 0x10


def whole(path: Path) -> bool:
    """Every member of the archive has the checksum and the size that were written with it, and torch can read it.

    ``torch.load`` alone does not look: it takes a flipped number as it is, and reads memory that nobody filled for a
    member that is marked as a folder. The checksums alone do not cover the archive's own directory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None or not all(map(_plain, archive.infolist())):
                return False
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except _DAMAGED:
        return False
    return True


def write_failed(error: Exception) -> bool:
    """Whether ``torch.save`` ran out of space, which it reports as a ``RuntimeError`` of its archive's writer."""
    return isinstance(error, OSError) or any(word in str(error) for word in ("PytorchStreamWriter", "inline_container"))


def _plain(member: zipfile.ZipInfo) -> bool:
    """As torch writes it: a file, not compressed. No checksum covers these fields."""
    return not member.external_attr & _FOLDER and member.file_size == member.compress_size
