"""Pruned learning around any defense: weights off the mask are zero, are not trained, and are not sent."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, final

import torch
from torch import Tensor, nn

from gia_bench.defenses.base import AskClient, BatchLoss, Client, Defense, NoiseLaw
from gia_bench.defenses.selection import Mask, on_support
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Begun, Pruning, Trained
from gia_bench.pruning.none import NoPruning
from gia_bench.values import Batch, Buffers, Examples, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import ALIGNED, DENSE, EVIDENCE, Codec, Kept
from gia_bench.wire.aligned import MASK

OWN = "pruning."
"""What is ours, and not the inner defense's, in states and announcements."""
STRENGTH, HELD, TRAINED = OWN + "strength", OWN + EVIDENCE, OWN + "trained."

Tensors = TypeVar("Tensors", bound=Mapping[str, Tensor])


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned(Defense):
    """``inner`` on a model that ``method`` prunes. first, weights, victim: the masks before round 0, the weights
    then (where the method has trained them), and whose they are; set by ``calibrate``.

    Gradients are cut to the mask before a local step, updates before ``inner`` protects them and again afterwards
    (noise cannot write off the mask), and the server's weights after its step, whatever its momentum does. Shares of a
    sparsifying ``inner`` count pruned entries too. The server announces the masks of pruned tensors,
    ``mask.<parameter>``, and in a round after which they change also ``pruning.strength``, float64.

    Evidence that a method asks for (squared gradients, own masks) passes by ``inner``: it is neither clipped nor
    noised, and no privacy is claimed for it. Raises ``IncompatibleError`` for a defense that announces masks of its own
    (ADGP).
    """

    inner: Defense
    method: Pruning
    first: Mask = field(default_factory=dict)
    weights: Params = field(default_factory=dict)
    victim: Victim | None = None

    def __post_init__(self) -> None:
        if any(stage.codec is ALIGNED for stage in self.inner.leaves()):
            raise IncompatibleError(
                "Pruning announces masks for all clients, and the defense announces its own (adgp): two masks of one "
                "round cannot both be what everybody sends. Choose defense=dgp, or pruning=none."
            )

    @property
    def codec(self) -> Codec:
        """The inner defense's, on what the masks keep."""
        return Kept(self.inner.codec)

    @property
    def model_codec(self) -> Codec:
        """What the masks keep."""
        return Kept(DENSE)

    def leaves(self) -> tuple[Defense, ...]:
        """The inner defense's."""
        return self.inner.leaves()

    def init_client(self, like: Params) -> State:
        """Both states."""
        return self.inner.init_client(like) | _ours(self.method.remember(like))

    def init_server(self, like: Params) -> State:
        """Both states; the masks are in it, and until ``settle`` has seen them the weights to start from."""
        masks = {OWN + MASK + k: m.to(like[k].device) for k, m in self.first.items()}
        trained = {TRAINED + k: w.to(like[k].device) for k, w in self.weights.items()}
        return self.inner.init_server(like) | masks | trained

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The inner defense's."""
        return self.inner.prepare_model(model)

    def check_victim(self, victim: Victim) -> None:
        """The inner defense is asked."""
        self.inner.check_victim(victim)

    def check_steps(self, sizes: Collection[int]) -> None:
        """The inner defense is asked."""
        self.inner.check_steps(sizes)

    def calibrate(self, victim: Victim, public: Examples) -> Defense:
        """With the first masks. Calibrated anew (on the model of a malicious server), it trains nothing."""
        inner = self.inner.calibrate(victim, public)
        # a copy: scoring puts the module into evaluation mode
        scored = dataclasses.replace(victim, module=copy.deepcopy(victim.module))
        begun = Begun(self.method.start(scored, public), {}) if self.first else self.method.begin(scored, public)
        return Pruned(inner=inner, method=self.method, first=begun.masks, weights=begun.params, victim=victim)

    def announce(
        self,
        like: Params,
        server_state: State,
        round_index: int,
        num_clients: int,
        draw: torch.Generator,
        ask: AskClient,
    ) -> Shared:
        """The masks that leave anything out; a tensor without one is whole."""
        masks = _masks(server_state, OWN + MASK)

        def ask_pruned(position: int) -> tuple[Update, State]:
            update, state = ask(position)
            return _cut(update, masks), _inner(state)

        inner = self.inner.announce(like, _inner(server_state), round_index, num_clients, draw, ask_pruned)
        own: Shared = {MASK + k: m.to(like[k].device) for k, m in masks.items() if not bool(m.all())}
        strength = self.method.strength(round_index)
        if strength is not None:
            own[STRENGTH] = torch.tensor(strength, dtype=torch.float64)
        return inner | own

    def asks(self, like: Params, shared: Shared) -> dict[str, Tensor]:
        """The method's evidence, where masks change."""
        if STRENGTH not in shared:
            return {}
        return {EVIDENCE + k: v for k, v in self.method.asks(like, self._announced(like, shared)).items()}

    def informed(self, shared: Shared) -> Defense:
        """Gradients on the masks, and what the method sees of them before they are cut."""
        watching = self.method if self.method.watches(_strength(shared)) else None
        return _OnMask(self.inner.informed(_inner(shared)), _masks(shared, MASK), watching)

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """The inner defense's."""
        return self.inner.draw(like, batch, generator)

    def transform(self, batch: Batch, noise: Noise) -> Batch:
        """The inner defense's."""
        return self.inner.transform(batch, noise)

    def start(self, client: Client, state: State, shared: Shared) -> Params:
        """The inner defense's, on the masks."""
        return _cut(self.inner.start(client, _inner(state), _inner(shared)), _masks(shared, MASK))

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        """The inner defense's, before masks are announced."""
        return self.inner.gradient(loss, params, batch, noise, step)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """What the inner defense sends of the update on the masks, and the evidence."""
        masks = _masks(shared, MASK)
        everywhere = self._announced(update, shared)
        trained = Trained(client.params, _cut(update, masks), everywhere, client.seen, _own(state))
        update, evidence, own = self.method.testify(trained, _strength(shared))
        both = masks | {k: everywhere[k] & v for k, v in evidence.items() if v.dtype == torch.bool}
        sent, after = self.inner.protect(_cut(update, both), client, _inner(state), _inner(shared), noise)
        return _cut(sent, both) | {EVIDENCE + k: v for k, v in evidence.items()}, after | _ours(own)

    def compensate(
        self, aggregate: Update, server_state: State, shared: Shared, shares: Sequence[float]
    ) -> tuple[Update, State]:
        """The inner defense's compensation, on the masks; the evidence waits for the server's step."""
        evidence = {k.removeprefix(EVIDENCE): v for k, v in aggregate.items() if k.startswith(EVIDENCE)}
        update = {k: v for k, v in aggregate.items() if not k.startswith(EVIDENCE)}
        update, inner = self.inner.compensate(update, _inner(server_state), _inner(shared), shares)
        own = {k: v for k, v in server_state.items() if k.startswith(OWN)}
        if STRENGTH in shared:
            update = self.method.combine(update, evidence)
            # masks are announced only after ``calibrate``, which sets the victim
            own_evidence = self.method.judge(self.victim, update) if self.victim is not None else {}
            held = {HELD + k: v for k, v in (evidence | own_evidence).items()}
            own |= held | {STRENGTH: shared[STRENGTH]}
        return _cut(update, _masks(shared, MASK)), inner | own

    def settle(self, params: Params, server_state: State) -> tuple[Params, State]:
        """The masks after the round, and the weights on them."""
        params = params | {k.removeprefix(TRAINED): v for k, v in server_state.items() if k.startswith(TRAINED)}
        params, inner = self.inner.settle(params, _inner(server_state))
        masks = {k: m.to(params[k].device) for k, m in _masks(server_state, OWN + MASK).items()}
        if STRENGTH in server_state:
            evidence = {k.removeprefix(HELD): v for k, v in server_state.items() if k.startswith(HELD)}
            masks = self.method.adjust(params, masks, evidence, float(server_state[STRENGTH]))
        return _cut(params, masks), inner | {OWN + MASK + k: m for k, m in masks.items()}

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The inner defense's stand-in on the masks; where those are hidden, where the observed update is not zero."""
        return self.inner.surrogate(self._as_seen(update, observation), self._inside(observation))

    def violation(self, update: Update, observation: Observation) -> Tensor:
        """The inner defense's: the masks do not depend on the update."""
        return self.inner.violation(self._as_seen(update, observation), self._inside(observation))

    @property
    def adds_noise(self) -> bool:
        """Whether the inner defense does."""
        return self.inner.adds_noise

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """The inner defense's: off the masks there is neither noise nor residual. Of rounding none where masks are
        hidden: what is rounded to 0 looks like what is off them."""
        if not self.inner.adds_noise and observation is not None and not observation.shared:
            return None
        return self.inner.noise_law(None if observation is None else self._inside(observation))

    def restore(self, update: Update, observation: Observation) -> Update:
        """The inner defense's, on the masks."""
        return self._as_seen(self.inner.restore(update, self._inside(observation)), observation)

    def measure(self, state: State) -> dict[str, Tensor]:
        """What the inner defense measures."""
        return self.inner.measure(_inner(state))

    def _announced(self, like: Mapping[str, Tensor], shared: Shared) -> Mask:
        """The masks of all prunable tensors."""
        masks = _masks(shared, MASK)
        return {k: masks[k] if k in masks else torch.ones_like(like[k], dtype=torch.bool) for k in self.first}

    def _as_seen(self, update: Update, observation: Observation) -> Update:
        if observation.shared:
            return _cut(update, _masks(observation.shared, MASK))
        seen = on_support({k: update[k] for k in self.first}, observation.update)
        return update | seen

    def _inside(self, observation: Observation) -> Observation:
        return dataclasses.replace(observation, shared=_inner(observation.shared), defense=self.inner)


def with_pruning(defense: Defense, method: Pruning) -> Defense:
    """``defense`` on a model that ``method`` prunes; itself where nothing is pruned."""
    return defense if isinstance(method, NoPruning) else Pruned(inner=defense, method=method)


@final
@dataclass(frozen=True, eq=False)
class _OnMask(Defense):
    """One client's gradients in one round; ``noted`` is its own, and lives as long as its local work."""

    inner: Defense
    masks: Mask
    watching: Pruning | None
    noted: State = field(default_factory=dict)

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        gradient, after, value = self.inner.gradient(loss, params, batch, noise, step)
        if self.watching is not None:
            self.noted.update(self.watching.witness(dict(self.noted), gradient, batch))
        return _cut(gradient, self.masks), after, value

    def seen(self) -> State:
        return self.noted

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        return update, state


def _cut(tensors: Update, masks: Mask) -> Update:
    """0 off the masks: plus zero, which the wire can leave out, and not a product, which could be minus zero."""
    return {k: torch.where(masks[k], v, 0) if k in masks else v for k, v in tensors.items()}


def _masks(tensors: Mapping[str, Tensor], prefix: str) -> Mask:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _strength(shared: Shared) -> float | None:
    return float(shared[STRENGTH]) if STRENGTH in shared else None


def _ours(state: State) -> State:
    return {OWN + k: v for k, v in state.items()}


def _own(state: State) -> State:
    return {k.removeprefix(OWN): v for k, v in state.items() if k.startswith(OWN)}


def _inner(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if not k.startswith((OWN, MASK))}
