"""Whether a file that ``torch.save`` wrote is whole."""

from __future__ import annotations

import zipfile
from pathlib import Path


def whole(path: Path) -> bool:
    """Every member of the archive has the checksum that was written with it. ``torch.load`` alone does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
