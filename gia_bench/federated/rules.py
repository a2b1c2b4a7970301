"""What stays the same from round to round, and what the server holds between two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

from gia_bench.defenses.base import Defense
from gia_bench.errors import ConfigError, choices
from gia_bench.federated.aggregation import Aggregation, Plain
from gia_bench.federated.execution import Executor
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.values import Buffers, Params, State

WEIGHTINGS = ("examples", "uniform")
NONFINITE_POLICIES = ("fail", "drop_client")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Rules:
    """weighting: "examples" | "uniform"; on_nonfinite: "fail" | "drop_client"."""

    victim: Victim
    defense: Defense
    local: LocalWork
    executor: Executor
    seed: int
    weighting: str = "examples"
    on_nonfinite: str = "fail"
    aggregation: Aggregation = Plain()  # noqa: RUF009 (frozen, without fields)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("fl.weighting", self.weighting, WEIGHTINGS),
            ("fl.on_nonfinite", self.on_nonfinite, NONFINITE_POLICIES),
        ):
            if value not in known:
                raise ConfigError(choices(name, value, known))


class Server(NamedTuple):
    """The server's side between rounds."""

    params: Params
    buffers: Buffers
    defense: State
