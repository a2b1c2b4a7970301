"""What one line of ``records.jsonl`` says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, final

from gia_bench.errors import ConfigError, choices

Status: TypeAlias = Literal["ok", "failed", "unavailable"]
Better: TypeAlias = Literal["higher", "lower"]


@dataclass(frozen=True)
class Quantity:
    """What a metric's numbers mean: their unit (None: a bare number) and which way is better for the defender."""

    unit: str | None
    better_for_defender: Better | None


_LEAK: Mapping[str, Quantity] = {
    "mse": Quantity(None, "higher"),
    "psnr_db": Quantity("dB", "lower"),
    "ssim": Quantity(None, "lower"),
    "lpips_alex": Quantity(None, "higher"),
    "lpips_squeeze": Quantity(None, "higher"),
    "lpips_vgg": Quantity(None, "higher"),
    "nmi": Quantity(None, "lower"),
}

ORACLE = "oracle_"
"""Begins the name of whatever the truth helped to pick."""

METRICS: Mapping[str, Quantity] = {
    # the leak, per victim image; and the best that an ensemble could have chosen, had it known the truth
    **_LEAK,
    **{f"{ORACLE}{name}": quantity for name, quantity in _LEAK.items()},
    # what a flat image of the truth's own mean colour would score: an attack below it has rebuilt nothing
    "oracle_flat_psnr_db": Quantity("dB", None),
    # the leak, per attacked update
    "label_accuracy": Quantity(None, "lower"),
    # how much an attack has to find, and from how much
    "examples": Quantity(None, None),
    "unknowns": Quantity(None, None),
    "equations": Quantity(None, None),
    "local_steps": Quantity(None, None),
    "attack_score": Quantity(None, None),
    "attack_seconds": Quantity("s", "higher"),
    # restarts of an attack whose search left the numbers; what is measured is their best iterate before
    "diverged_restarts": Quantity(None, None),
    # utility
    "train_loss": Quantity(None, None),
    "test_loss": Quantity(None, None),
    "test_accuracy": Quantity(None, None),
    # cost: bytes of one client in one round, as packed and as they would be dense
    "uplink_bytes": Quantity("B", None),
    "downlink_bytes": Quantity("B", None),
    "dense_uplink_bytes": Quantity("B", None),
    "dense_downlink_bytes": Quantity("B", None),
    "round_seconds": Quantity("s", None),
    # theory, per attacked client: ||g - sent|| / ||g||, and the shares of ||g||^2 in the largest 5 % and smallest 75 %
    "relative_gradient_distance": Quantity(None, "higher"),
    "energy_top_k1": Quantity(None, None),
    "energy_bottom_k2": Quantity(None, None),
    # of an attacked update, the share of entries that is not zero, and what a bound of this form says (a trend)
    "sent_share": Quantity(None, None),
    "leakage_trend_nats": Quantity("nat", "lower"),
    # differential privacy spent so far by whoever has spent most: of an example before a server that sees each update,
    # of a client before those who see the models only, and of a client before a server that sees each update
    "example_epsilon_rdp": Quantity(None, "lower"),
    "example_epsilon_prv": Quantity(None, "lower"),
    "client_epsilon_rdp": Quantity(None, "lower"),
    "client_epsilon_prv": Quantity(None, "lower"),
    "client_local_epsilon_rdp": Quantity(None, "lower"),
    "client_local_epsilon_prv": Quantity(None, "lower"),
    # what a defense holds back; of the entries with a change, the share that a client's own mask (PriPrune) does
    "defense_pruning_rate": Quantity(None, None),
    "residual_norm": Quantity(None, None),
    "never_sent_share": Quantity(None, None),
    "dropped_clients": Quantity(None, None),
}
"""Every metric a record may carry."""


@final
@dataclass(frozen=True, kw_only=True)
class Record:
    """One value with everything needed to read it alone. ``None`` where a key does not apply.

    The fields, in this order, are the keys of a line. Raises ``ConfigError`` for an unknown metric, for a value that is
    not finite (JSON has no NaN), for "ok" without a value, for anything else without a reason, and for a ``run_id`` of
    digits alone.
    """

    run_id: str
    experiment: str | None
    seed: int
    dataset: str
    model: str
    fl: str
    threat: str | None
    attack: str | None
    defense: str
    round: int | None
    client: int | None
    victim: int | None
    metric: str
    value: float | None
    unit: str | None
    better_for_defender: Better | None
    status: Status
    reason: str | None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(choices("metric", self.metric, METRICS))
        if self.value is not None and not math.isfinite(self.value):
            raise ConfigError(f"record of {self.metric}: value={self.value} is not finite. Record it as failed.")
        if (self.value is None) == (self.status == "ok") or (self.status != "ok" and not self.reason):
            raise ConfigError(
                f"record of {self.metric}: status={self.status!r}, value={self.value}, reason={self.reason!r}. "
                "Status 'ok' goes with a value, any other with a reason and no value."
            )
        if _is_number(self.run_id):
            raise ConfigError(
                f"record: run_id={self.run_id!r} reads as a number, and pandas would turn it into one. "
                "Put a letter in front of it, such as 'r'."
            )

    @classmethod
    def of(
        cls,
        metric: str,
        value: float | None,
        *,
        run_id: str,
        experiment: str | None,
        seed: int,
        dataset: str,
        model: str,
        fl: str,
        threat: str | None,
        defense: str,
        round: int | None = None,
        client: int | None = None,
        victim: int | None = None,
        attack: str | None = None,
        status: Status = "ok",
        reason: str | None = None,
    ) -> Record:
        """A record with the metric's own unit and direction. A value of NaN or infinity becomes a failed one.

        Raises ``ConfigError`` as ``Record`` does.
        """
        if metric not in METRICS:
            raise ConfigError(choices("metric", metric, METRICS))
        if value is not None and not math.isfinite(value):
            value, status, reason = None, "failed", f"the value is {value}"
        return cls(
            run_id=run_id,
            experiment=experiment,
            seed=seed,
            dataset=dataset,
            model=model,
            fl=fl,
            threat=threat,
            attack=attack,
            defense=defense,
            round=round,
            client=client,
            victim=victim,
            metric=metric,
            value=None if value is None else float(value),
            unit=METRICS[metric].unit,
            better_for_defender=METRICS[metric].better_for_defender,
            status=status,
            reason=reason,
        )

    def to_json(self) -> str:
        """One line without its newline, strict JSON."""
        return _to_json(vars(self))


_to_json = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
KEYS: tuple[str, ...] = tuple(field.name for field in fields(Record))
"""The keys of a record, in their order."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
