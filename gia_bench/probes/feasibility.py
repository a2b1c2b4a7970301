"""Unknowns against equations, before an expensive attack, and after it whether its control held."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import median

import torch

from gia_bench.attacks.joint import exact
from gia_bench.metrics.evaluate import FLAT, Scores
from gia_bench.models.functional import Victim
from gia_bench.values import Observation

log = logging.getLogger(__name__)


def feasibility(observation: Observation, victim: Victim) -> dict[str, float]:
    """The attacked pixels, the entries of the update that say something about them, and the local steps behind it.

    examples: of the update, where the threat model shows their number; unknowns: examples x C x H x W; equations:
    entries of the update that are not zero, or were not in an earlier round of as many examples, where the attack takes
    them: it adds the rounds up; local_steps: where they are shown. Fewer equations than unknowns leave an attack with
    what its prior says. More promise nothing: equations repeat each other, an attack may mute layers, and a network
    forgets.
    """
    count, local = observation.num_examples, observation.local
    earlier = () if exact(observation) else observation.earlier  # of exact sums the last round's entries alone count
    updates = [observation.update, *(past.update for past in earlier if past.num_examples == count)]
    sent = (sum(update[k] != 0 for update in updates) for k in observation.update)
    known = {"equations": float(sum(int(torch.as_tensor(times).count_nonzero()) for times in sent))}
    if count is not None:
        known |= {"examples": float(count), "unknowns": float(count * math.prod(victim.input_shape))}
        if local is not None:
            known["local_steps"] = float(sum(map(len, local.plan(count))))
    return known


def tell(attack: str, updates: Sequence[Mapping[str, float]]) -> None:
    """One line for all the updates that ``attack`` is about to look at, and a warning where some are too few equations
    for their pixels. ``updates``: of each, what ``feasibility`` found."""
    names = dict.fromkeys(name for known in updates for name in known)
    spans = {name: [known[name] for known in updates if name in known] for name in names}
    told = ", ".join(f"{name} {_span(values)}" for name, values in spans.items())
    log.info("%s looks at %d update%s: %s", attack, len(updates), "s" * (len(updates) != 1), told)
    few = sum(known["equations"] < known.get("unknowns", 0.0) for known in updates)
    if few:
        log.warning(
            "%s: %d of %d updates have more unknown pixels than equations: what is rebuilt of them is the prior's "
            "guess", attack, few, len(updates),
        )  # fmt: skip


def tell_control(attack: str, scores: Sequence[Scores]) -> None:
    """One line on whether ``attack`` shows anything of undefended updates, in the median over their images: where it
    does not, what it finds under a defense says nothing about the defense."""
    own, flat = (
        [v.value for one in scores for v in one.values if v.metric == metric and v.value is not None]
        for metric in ("psnr_db", FLAT)
    )
    if not own or not flat:
        return
    reached, colour = median(own), median(flat)
    if reached > colour:
        log.info("%s: the control holds, %.1f dB in the median, a flat image %.1f dB", attack, reached, colour)
    else:
        log.warning(
            "%s: failed control, without a defense it reaches %.1f dB in the median, and a flat image of the right "
            "colour %.1f dB; under a defense it says nothing", attack, reached, colour,
        )  # fmt: skip


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
