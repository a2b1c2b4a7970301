"""Several defenses, one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar, final

import torch
from torch import Tensor, nn

from gia_bench.defenses.base import AskClient, BatchLoss, Client, Defense, NoiseLaw
from gia_bench.defenses.chain_order import wrong_order
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Examples, Noise, Observation, Params, Payload, Shared, State, Update
from gia_bench.wire import DENSE, Codec, places

Values = TypeVar("Values", Shared, State, Noise)


@final
@dataclass(frozen=True, kw_only=True)
class Chain(Defense):
    """``stages`` in their order on the client, in reverse on the server. Their names only appear in messages.

    Each stage sees its own state, noise and announcement; in the chain's they carry the stage's position:
    ``0.residual.<parameter>``. A stage's random numbers do not depend on those of the stages before it, and the first
    stage draws what it would draw alone. What several stages measure under one name is the last one's.

    Raises ``ConfigError`` for no stage at all and for a chain in a chain, and ``IncompatibleError`` for a wrong order:
    a stage whose leader is asked for the update before any protection (ADGP) that is not the first; two that compute
    the gradient (DP-SGD, PRECODE, Outpost); noise before what clips it away; ATS after the mixing that it cannot take
    apart; and a stage that fills, after one that packs what few bits can hold, the places where nothing should travel.
    """

    stages: Mapping[str, Defense]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", dict(self.stages))
        names, stages = list(self.stages), self.parts
        if not stages:
            raise ConfigError("defense chain: stages is empty; name at least one, or use defense=none.")
        for name, stage in self.stages.items():
            if isinstance(stage, Chain):
                raise ConfigError(f"defense chain: {name} is a chain itself; write its stages in its place.")
        order = f"the order is {', '.join(names)}"
        led = [n for n, s in self.stages.items() if s.asks_a_leader]
        if led and led != names[:1]:
            raise IncompatibleError(
                f"defense chain: {led[-1]} announces what its leader would send without protection, so it must be the "
                f"only such stage and the first, but {order}; put it first."
            )
        computing = [n for n, s in self.stages.items() if s.own_gradients]
        if len(computing) > 1:
            raise IncompatibleError(
                f"defense chain: {' and '.join(computing)} both compute the gradient; keep one of them."
            )
        for (first, early), (second, late) in combinations(self.stages.items(), 2):
            why = wrong_order(early, late)
            if why is not None:
                raise IncompatibleError(f"defense chain: {second} comes after {first}, {why}, but {order}.")

    @property
    def parts(self) -> tuple[Defense, ...]:
        """The stages without their names."""
        return tuple(self.stages.values())

    @property
    def codec(self) -> Codec:
        """The last stage's that packs otherwise than densely: its update is what later stages still shape.

        Sparse and narrow codecs lose nothing whatever comes after them, they only save less.
        """
        return _Within(self._packing, self.parts[self._packing].codec)

    @property
    def _packing(self) -> int:
        return max((i for i, s in enumerate(self.parts) if s.codec is not DENSE), default=0)

    @property
    def _acting(self) -> list[tuple[int, Defense]]:
        """The stages with their positions, in the order in which they touch an update: first DP-SGD, which is done when
        it is computed."""
        return sorted(enumerate(self.parts), key=lambda placed: not isinstance(placed[1], DPSGD))

    def _seen_by(self, position: int, observation: Observation) -> Observation:
        shared = _part(observation.shared, position)
        return dataclasses.replace(observation, shared=shared, defense=self.parts[position])

    def leaves(self) -> tuple[Defense, ...]:
        """Those of all stages."""
        return tuple(leaf for stage in self.parts for leaf in stage.leaves())

    def init_client(self, like: Params) -> State:
        """All stages' states."""
        return _together([s.init_client(like) for s in self.parts])

    def init_server(self, like: Params) -> State:
        """All stages' states."""
        return _together([s.init_server(like) for s in self.parts])

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Changed by all stages in order."""
        for stage in self.parts:
            model = stage.prepare_model(model)
        return model

    def check_victim(self, victim: Victim) -> None:
        """Every stage is asked."""
        for stage in self.parts:
            stage.check_victim(victim)

    def check_steps(self, sizes: Collection[int]) -> None:
        """Every stage is asked."""
        for stage in self.parts:
            stage.check_steps(sizes)

    def calibrate(self, victim: Victim, public: Examples) -> Defense:
        """Every stage by itself."""
        return Chain(stages={name: stage.calibrate(victim, public) for name, stage in self.stages.items()})

    def announce(
        self,
        like: Params,
        server_state: State,
        round_index: int,
        num_clients: int,
        draw: torch.Generator,
        ask: AskClient,
    ) -> Shared:
        """All stages' announcements; only the first may ask a leader."""

        def ask_first(position: int) -> tuple[Update, State]:
            update, state = ask(position)
            return update, _part(state, 0)

        return _together(
            [
                stage.announce(like, _part(server_state, i), round_index, num_clients, draw, ask_first)
                for i, stage in enumerate(self.parts)
            ]
        )

    @property
    def asks_a_leader(self) -> bool:
        """Whether the first stage does."""
        return self.parts[0].asks_a_leader

    @property
    def own_gradients(self) -> bool:
        """Whether a stage has."""
        return any(stage.own_gradients for stage in self.parts)

    def informed(self, shared: Shared) -> Defense:
        """Every stage by its own announcement."""
        own = {n: s.informed(_part(shared, i)) for i, (n, s) in enumerate(self.stages.items())}
        return Chain(stages=own) if any(own[n] is not s for n, s in self.stages.items()) else self

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """All stages' random numbers, each from a stream of its own."""
        seed = generator.initial_seed()
        later = [stream(seed, "stage", i) for i in range(1, len(self.parts))]
        return _together([s.draw(like, batch, g) for s, g in zip(self.parts, [generator, *later], strict=True)])

    def transform(self, batch: Batch, noise: Noise) -> Batch:
        """Transformed by all stages in order."""
        for i, stage in enumerate(self.parts):
            batch = stage.transform(batch, _part(noise, i))
        return batch

    def start(self, client: Client, state: State, shared: Shared) -> Params:
        """With all that stayed with the client in any stage."""
        for i, stage in enumerate(self.parts):
            client = client._replace(params=stage.start(client, _part(state, i), _part(shared, i)))
        return client.params

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        """By the stage that has its own way, or plainly."""
        own = (i for i, s in enumerate(self.parts) if s.own_gradients)
        chosen = next(own, 0)
        return self.parts[chosen].gradient(loss, params, batch, _part(noise, chosen), step)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """Protected by all stages in order."""
        states = []
        for i, stage in enumerate(self.parts):
            update, after = stage.protect(update, client, _part(state, i), _part(shared, i), _part(noise, i))
            states.append(after)
        return update, _together(states)

    def compensate(
        self, aggregate: Update, server_state: State, shared: Shared, shares: Sequence[float]
    ) -> tuple[Update, State]:
        """Compensated by all stages, the last one first."""
        states: list[State] = []
        for i, stage in reversed(list(enumerate(self.parts))):
            aggregate, after = stage.compensate(aggregate, _part(server_state, i), _part(shared, i), shares)
            states.insert(0, after)
        return aggregate, _together(states)

    def settle(self, params: Params, server_state: State) -> tuple[Params, State]:
        """Settled by all stages, the last one first."""
        states: list[State] = []
        for i, stage in reversed(list(enumerate(self.parts))):
            params, after = stage.settle(params, _part(server_state, i))
            states.insert(0, after)
        return params, _together(states)

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The stages' stand-ins in order; all of them look at the update that was observed in the end."""
        for i, stage in self._acting:
            update = stage.surrogate(update, self._seen_by(i, observation))
        return update

    def violation(self, update: Update, observation: Observation) -> Tensor:
        """The stages' sum, each for the update that the stages before it would have made of the dummy.

        All look at what was observed in the end.
        """
        found = []
        for i, stage in self._acting:
            own = self._seen_by(i, observation)
            found.append(stage.violation(update, own))
            update = stage.surrogate(update, own)
        return torch.stack(found).sum()

    @property
    def adds_noise(self) -> bool:
        """Whether a stage does."""
        return any(stage.adds_noise for stage in self.parts)

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """The last stage's, where no other one leaves anything to chance. Of rounding none behind a stage that packs:
        whose stand-in reads what was sent off the zeros, and takes for withheld what was rounded to 0."""
        *before, (place, last) = self._acting
        if any(stage.adds_noise or stage.noise_law() is not None for _, stage in before):
            return None
        if not last.adds_noise and any(stage.codec is not DENSE for _, stage in before):
            return None
        return last.noise_law(None if observation is None else self._seen_by(place, observation))

    def restore(self, update: Update, observation: Observation) -> Update:
        """By all stages, the last one first."""
        for i, stage in reversed(list(enumerate(self.parts))):
            update = stage.restore(update, self._seen_by(i, observation))
        return update

    def measure(self, state: State) -> dict[str, Tensor]:
        """All that the stages measure."""
        measured: dict[str, Tensor] = {}
        for i, stage in enumerate(self.parts):
            measured |= stage.measure(_part(state, i))
        return measured


@final
@dataclass(frozen=True)
class _Within:
    """A stage's codec, which looks for that stage's announcement in the chain's."""

    position: int
    codec: Codec

    def encode(self, update: Update, shared: Shared, num_examples: int) -> Payload:
        return self.codec.encode(update, _part(shared, self.position), num_examples)

    def decode(self, payload: Payload, like: Params, shared: Shared) -> Update:
        return self.codec.decode(payload, like, _part(shared, self.position))

    def places(self, like: Params, shared: Shared) -> dict[str, Tensor]:
        return places(self.codec, like, _part(shared, self.position))


def _together(parts: list[Values]) -> Values:
    return {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()}


def _part(together: Values, position: int) -> Values:
    prefix = f"{position}."
    return {k.removeprefix(prefix): v for k, v in together.items() if k.startswith(prefix)}
