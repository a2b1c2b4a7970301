"""Which defense may not come after which in a chain."""

from __future__ import annotations

from gia_bench.defenses.ats import ATS
from gia_bench.defenses.base import Defense
from gia_bench.defenses.client_dp import ClientDP
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.mixup import InstaHide, MixUp
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.precode import PRECODE
from gia_bench.wire import DENSE

KEEP_ZEROS = (NoDefense, ClipUpdate, DPSGD, PRECODE, ATS, MixUp, InstaHide)
"""Of the defenses that pack densely: those that send zero where they are given zero."""

CLIPS = (ClipUpdate, ClientDP)


def wrong_order(early: Defense, late: Defense) -> str | None:
    """Why ``late`` may not come after ``early``, wherever in between others stand; None where it may."""
    # DP-SGD clips and noises inside the gradient, and its budget outlives whatever is done to the update afterwards
    if isinstance(late, CLIPS) and early.adds_noise and not isinstance(early, DPSGD):
        return "and would clip the noise with the update, so that neither is what was set: clip first"
    if isinstance(late, ATS) and isinstance(early, MixUp | InstaHide):
        return "and would transform a mixture of images: transform first"
    if early.codec is not DENSE and late.codec is DENSE and not isinstance(late, KEEP_ZEROS):
        return "and would fill what it empties, so that nothing is saved: put what packs last"
    return None
