"""How the clients of a cohort are computed: one after another, or mapped together; equal numbers either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, final

from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from gia_bench.data.cohort import Cohort
from gia_bench.errors import ConfigError, choices
from gia_bench.values import Batch, Buffers, Noise, State, Update


class ClientInputs(NamedTuple):
    """What differs between clients: batch [S, B, ...], buffers, the defense's state and random numbers."""

    batch: Batch
    buffers: Buffers
    state: State
    noise: Noise


class ClientOutputs(NamedTuple):
    """What a client is left with: the protected update, its buffers, its next state, its mean loss."""

    sent: Update
    buffers: Buffers
    state: State
    loss: Tensor


ClientWork: TypeAlias = Callable[[ClientInputs, Sequence[int] | None], ClientOutputs]
"""One client's round, for inputs without a client axis; the numbers are the exact sizes of its steps, or None."""


class Executor(Protocol):
    """Cuts a cohort into chunks and computes one."""

    def chunks(self, cohort: Cohort, members: Sequence[int], batch_coupled: bool) -> Iterator[list[int]]:
        """Positions in the cohort that are computed together."""
        ...

    def run(self, work: ClientWork, inputs: ClientInputs, cohort: Cohort, chunk: Sequence[int]) -> ClientOutputs:
        """``work`` for every client of the chunk; inputs and outputs carry a leading client axis [k, ...]."""
        ...


@final
@dataclass(frozen=True)
class Loop:
    """One client after another; an error names the client."""

    def chunks(self, cohort: Cohort, members: Sequence[int], batch_coupled: bool) -> Iterator[list[int]]:
        """Singles."""
        return ([m] for m in members)

    def run(self, work: ClientWork, inputs: ClientInputs, cohort: Cohort, chunk: Sequence[int]) -> ClientOutputs:
        """The only client of the chunk, without padding."""
        [member] = chunk
        alone: ClientInputs = tree_map(lambda t: t[0], inputs)
        try:
            outputs = work(alone, cohort.counts[member])
        except Exception as error:
            error.add_note(f"It happened at client {cohort.clients[member]} in round {cohort.round_index}.")
            raise
        result: ClientOutputs = tree_map(lambda t: t[None], outputs)
        return result


@final
@dataclass(frozen=True, kw_only=True)
class Vmap:
    """``chunk_size`` clients at a time under ``torch.func.vmap``; memory is O(chunk_size x parameters).

    Where examples of a batch are coupled (BatchNorm), only clients whose steps have the same sizes share a chunk, so
    that no padding enters the statistics.
    """

    chunk_size: int = 16

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ConfigError(f"fl.executor.chunk_size={self.chunk_size}: give at least 1.")

    def chunks(self, cohort: Cohort, members: Sequence[int], batch_coupled: bool) -> Iterator[list[int]]:
        """Runs of at most ``chunk_size`` members."""
        groups: dict[object, list[int]] = {}
        for m in members:
            groups.setdefault(cohort.counts[m] if batch_coupled else None, []).append(m)
        for group in groups.values():
            for start in range(0, len(group), self.chunk_size):
                yield group[start : start + self.chunk_size]

    def run(self, work: ClientWork, inputs: ClientInputs, cohort: Cohort, chunk: Sequence[int]) -> ClientOutputs:
        """All clients of the chunk at once; steps of equal size are cut to it, others rely on the mask."""
        shapes = {cohort.counts[m] for m in chunk}
        counts = shapes.pop() if len(shapes) == 1 else None
        mapped: ClientOutputs = vmap(lambda one: work(one, counts))(inputs)
        return mapped


def executor(kind: str, chunk_size: int) -> Executor:
    """``vmap`` or ``loop``; a loop needs no ``chunk_size``. Raises ``ConfigError`` for another name."""
    made: dict[str, Executor] = {"vmap": Vmap(chunk_size=chunk_size), "loop": Loop()}
    if kind not in made:
        raise ConfigError(choices("fl.executor.kind", kind, made))
    return made[kind]
