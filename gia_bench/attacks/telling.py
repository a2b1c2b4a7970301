"""How often a search that goes on says how far it is."""

from __future__ import annotations

import time
from typing import final

TELL_EVERY = 30.0
"""Seconds between two lines about one search."""


@final
class Telling:
    """The clock of one search."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for a line; if so, the next one is due ``TELL_EVERY`` seconds from now."""
        now = time.monotonic()
        if now - self._told < TELL_EVERY:
            return False
        self._told = now
        return True
