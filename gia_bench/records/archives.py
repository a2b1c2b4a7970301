"""Whether a file that ``torch.save`` wrote is whole."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

# what zipfile raises where a flag, a name or an offset is damaged, beside its own BadZipFile
_DAMAGED = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error)
_FOLDER = 0x10


def whole(path: Path) -> bool:
    """Every member of the archive has the checksum and the size that were written with it.

    ``torch.load`` alone does not look: it takes a flipped number as it is, and reads memory that nobody filled for a
    member that is marked as a folder.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and all(map(_plain, archive.infolist()))
    except _DAMAGED:
        return False


def _plain(member: zipfile.ZipInfo) -> bool:
    """As torch writes it: a file, not compressed. No checksum covers these fields."""
    return not member.external_attr & _FOLDER and member.file_size == member.compress_size
