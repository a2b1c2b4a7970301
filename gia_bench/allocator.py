"""How the C library keeps memory that tensors on the CPU have freed.

By default glibc maps large tensors anew each time and hands the end of its heap back as soon as it is free. The kernel
then clears the same pages again in every step: a tenth of the time of an attack on 64 small networks at once.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1
"""Bytes free at the end of the heap before any go back to the system."""
LARGEST = 32 * 2**20
"""Bytes of a tensor from which it is mapped by itself: the most that glibc allows."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 2 GiB of freed memory for the next tensors. No number changes.

    False where it is not kept: another C library, or a user who chose with glibc's own MALLOC_TRIM_THRESHOLD_ or
    MALLOC_MMAP_THRESHOLD_.
    """
    if not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}.isdisjoint(os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # no C library to be had by no name: not a POSIX system
        return False
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(library.mallopt(M_TRIM_THRESHOLD, KEPT))
