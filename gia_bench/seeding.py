"""Randomness is data: every draw comes from a stream that is named by its coordinates.

No stream depends on how many numbers another one gave, so a loop, ``vmap`` with any chunk size, any number of
ranks and a resumed run all draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *coordinates: int | str) -> int:
    """A 63-bit seed for the place named by ``coordinates``; a pure function of its arguments."""
    text = "\x1f".join([str(int(seed)), *(f"{type(c).__name__}:{c}" for c in coordinates)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, *coordinates: int | str) -> torch.Generator:
    """A generator on the CPU for one place, for example ``stream(seed, "noise", round_index, client)``.

    On the CPU whatever the device of the run, so that a GPU draws the same numbers as a laptop.
    """
    return torch.Generator(device="cpu").manual_seed(derive(seed, *coordinates))


@contextmanager
def seeded(seed: int, *coordinates: int | str) -> Iterator[None]:
    """Code that draws from torch's global generator (``nn.Module.__init__``) draws from one named stream inside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, *coordinates))
        yield
