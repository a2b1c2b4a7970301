"""Unknowns against equations, before an expensive attack."""

from __future__ import annotations

import logging
import math

from gia_bench.models.functional import Victim
from gia_bench.values import Observation

log = logging.getLogger(__name__)


def feasibility(observation: Observation, victim: Victim) -> dict[str, float]:
    """The attacked pixels, the entries of the update that say something about them, and the local steps behind it.

    examples: of the update, where the threat model shows their number; unknowns: examples x C x H x W; equations:
    entries of the update (and of earlier rounds, where the attack takes them) that are not zero; local_steps: where
    they are shown. Fewer equations than unknowns leave an attack with what its prior says. More promise nothing:
    equations repeat each other, and a network forgets.
    """
    count, local = observation.num_examples, observation.local
    updates = [observation.update, *(earlier.update for earlier in observation.earlier)]
    known = {"equations": float(sum(int(t.count_nonzero()) for update in updates for t in update.values()))}
    if count is not None:
        known |= {"examples": float(count), "unknowns": float(count * math.prod(victim.input_shape))}
        if local is not None:
            known["local_steps"] = float(sum(map(len, local.plan(count))))
    log.info("an update to attack: %s", ", ".join(f"{name} {value:.0f}" for name, value in known.items()))
    if known["equations"] < known.get("unknowns", 0.0):
        log.warning(
            "an update of %d examples has %d unknown pixels and %d equations: what is rebuilt is the prior's guess",
            count, known["unknowns"], known["equations"],
        )  # fmt: skip
    return known
