"""The files behind a dataset: are they there, can they be fetched, and which one is broken."""

from __future__ import annotations

import http.client
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torchvision.datasets.utils import check_integrity

from gia_bench.errors import DataError

UNREADABLE = (
    OSError,  # absent, unreadable, truncated gzip, undecodable image
    EOFError,
    RuntimeError,  # torchvision's and torch's own checks: checksums, shapes
    ValueError,  # numbers that cannot be, bad JSON, bad unicode
    TypeError,
    AttributeError,
    LookupError,  # a key or an item that should be there
    AssertionError,  # torchvision's reader of MNIST's files
    SyntaxError,  # Pillow's word for a broken PNG
    struct.error,
    zlib.error,
    pickle.UnpicklingError,
    tarfile.TarError,
    zipfile.BadZipFile,
)
"""Everything that the readers used here raise for a broken file."""

PATIENCE_SECONDS = 30.0
"""A server that says nothing for so long is taken for absent."""


@final
@dataclass(frozen=True, kw_only=True)
class Files:
    """What a dataset needs below ``folder``: ``names`` to read, ``archives`` (name -> MD5) they are unpacked from,
    and ``urls`` for people."""

    dataset: str
    folder: Path
    names: tuple[str, ...]
    archives: dict[str, str]
    urls: tuple[str, ...]

    def must_fetch(self, download: bool) -> bool:
        """Whether torchvision has to download or unpack. Raises ``DataError`` for a corrupt archive, and where files
        are absent and may not be downloaded."""
        try:
            missing = [name for name in self.names if not (self.folder / name).exists()]
            at_hand = [name for name in self.archives if (self.folder / name).exists()]
        except PermissionError as e:
            raise self.absent(one_line(e)) from e
        if not missing:
            return False
        for name in at_hand:
            if not check_integrity(self.folder / name, self.archives[name]):
                raise self.corrupt(name, f"its MD5 is not {self.archives[name]}")
        if download or len(at_hand) == len(self.archives) > 0:
            return True
        raise self.absent("dataset.download is false")

    def absent(self, why: str) -> DataError:
        """The one sentence that brings a person without files to the files."""
        return DataError(
            f"{self.dataset} is not in {self.folder} ({why}); expected there: {', '.join(self.names)}. "
            f"Fetch {' and '.join(self.urls)} into {self.folder}, or set GIA_BENCH_DATA to the folder that holds "
            "the data."
        )

    def corrupt(self, name: str, why: str, instead: str = "") -> DataError:
        """A file that is there but is not what it should be."""
        return DataError(
            f"{self.dataset}: {self.folder / name} is corrupt ({why}); delete it and what was unpacked from it to have "
            f"it fetched again from {' and '.join(self.urls)}{instead}."
        )

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Whatever a download or an unpacking breaks on becomes ``absent``."""
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(PATIENCE_SECONDS)
        try:
            yield
        except (OSError, RuntimeError, http.client.HTTPException, EOFError, tarfile.TarError, zipfile.BadZipFile) as e:
            raise self.absent(f"the download failed: {one_line(e)}") from e
        finally:
            socket.setdefaulttimeout(before)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Whatever the reading of one file breaks on becomes ``corrupt``."""
        try:
            yield
        except UNREADABLE as e:
            raise self.corrupt(name, one_line(e)) from e


def one_line(error: BaseException) -> str:
    """An error's kind and words on one line, as they stand inside a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": .")
