"""Victims that share the model and the batch size, as one function of all their candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.func import grad_and_value

from gia_bench.attacks.adaptive import Constraint, Informed
from gia_bench.attacks.arithmetic import PLAIN, PRECISIONS, Arithmetic, Step, farthest, normalises
from gia_bench.attacks.axes import chunks, mapped_over, stack
from gia_bench.attacks.distances import Distance
from gia_bench.attacks.layerwise import explained, gradients
from gia_bench.attacks.memory import free_bytes, largest_batch, peak_bytes
from gia_bench.attacks.optimizers import Variables
from gia_bench.attacks.priors import Prior
from gia_bench.attacks.replay import LocalSteps, Replay
from gia_bench.attacks.scene import Candidate, PixelSpace, Scene, update_unit
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Observation, Update

STEPS = LocalSteps()


class Seen(NamedTuple):
    """What differs between the victims of a group, stacked: [V, ...]; the labels taken by the attack, which may differ
    between restarts, [V, T or 1, ...]. Empty where it is not shown.
    """

    update: Update
    sent_buffers: Buffers
    shown_labels: dict[str, Tensor]
    labels: dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """The loss of V x T candidates and its gradient. ``template`` holds what all the victims share. step: how they are
    computed, see ``computed`` (None: the gradient of every candidate's loss by itself).
    """

    victim: Victim
    template: Observation
    seen: Seen
    space: PixelSpace
    distance: Distance
    priors: Mapping[str, Prior]
    constraints: Mapping[str, Constraint]
    replay: Replay
    max_batch: int | None
    arithmetic: Arithmetic = PLAIN
    step: Step | None = None

    @classmethod
    def of(
        cls,
        observations: Sequence[Observation],
        victim: Victim,
        labels: Sequence[Tensor | None],
        space: PixelSpace,
        distance: Distance,
        priors: Mapping[str, Prior],
        max_batch: int | None,
        constraints: Mapping[str, Constraint] | None = None,
        replay: Replay = STEPS,
    ) -> Group:
        """Stacks the victims on the device of the model's parameters. ``labels``: as taken by the attack, [B] or
        [T, B] each."""
        first, head = observations[0], victim.head or ()
        # the head stands last, wherever the module has it: who mutes the last layer of an update means the head
        params = {k: first.params[k].detach() for k in sorted(first.params, key=lambda k: k in head)}
        # an attacker who is not shown the statistics has those of the model as it is published
        buffers = {**victim.initial()[1], **first.buffers}
        device = next(iter(params.values())).device
        buffers = {k: v.to(device) for k, v in buffers.items()}
        seen = Seen(
            update=stack([o.update for o in observations], device),
            sent_buffers=stack([o.sent_buffers or {} for o in observations], device),
            shown_labels=stack([{} if o.labels is None else {"labels": o.labels} for o in observations], device),
            labels=stack([{} if y is None else {"labels": y if y.ndim == 2 else y[None]} for y in labels], device),
        )
        template = dataclasses.replace(first, params=params, buffers=buffers)
        return cls(
            victim=victim,
            template=template,
            seen=seen,
            space=space,
            distance=distance.informed(first, update_unit(first)) if isinstance(distance, Informed) else distance,
            priors=priors,
            constraints=constraints or {},
            replay=replay,
            max_batch=max_batch,
        )

    def loss(self, variables: Variables, seen: Seen, buffers: Buffers, dummy: Update) -> Tensor:
        """The loss of one candidate of one victim (scalar). dummy: its update, or empty, where it is found here."""
        observation = dataclasses.replace(
            self.template,
            buffers=buffers,
            update=seen.update,
            sent_buffers=seen.sent_buffers or None,
            labels=seen.shown_labels.get("labels"),
        )
        scene, candidate = Scene(self.victim, observation), self._candidate(variables, seen)
        batch = Batch(candidate.inputs, candidate.labels, candidate.pixels.new_ones(len(candidate.pixels)))
        dummy, unit = dummy or self.replay.update(batch, scene), update_unit(observation)
        sent = dummy if observation.defense is None else observation.defense.surrogate(dummy, observation)
        distance = self.distance(_in_units(sent, unit), _in_units(observation.update, unit))
        parts = [prior(candidate, scene) for prior in self.priors.values()]
        parts += [constraint(dummy, observation, unit) for constraint in self.constraints.values()]
        return sum(parts, distance + self.replay.penalty(candidate, scene))

    def _candidate(self, variables: Variables, seen: Seen) -> Candidate:
        """The guess, or all of them with the axes [V, T] in front."""
        labels = variables["labels"].softmax(-1) if "labels" in variables else seen.labels["labels"]
        return Candidate(variables["pixels"], self.space.decode(variables["pixels"]), labels)

    def evaluate(self, variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        """The losses [V, T] and their gradients, ``max_batch`` candidates at a time; see ``Evaluate``."""
        pixels = variables["pixels"]
        V, T = pixels.shape[:2]
        rows = torch.arange(V, device=pixels.device)
        # a compiled step would be compiled again for every number of victims
        if wanted is not None and pixels.device.type == "cpu" and not self.arithmetic.compile:
            rows = rows[wanted.any(1)]
        parts = chunks(len(rows), T, self.max_batch)
        if len(rows) == V and len(parts) == 1:
            slopes, loss = self._part(variables, *parts[0])
            return loss, slopes
        loss, slopes = pixels.new_full((V, T), torch.inf), {k: torch.zeros_like(v) for k, v in variables.items()}
        for few, restarts in parts:
            victims = few if len(rows) == V else rows[few]  # a slice copies nothing
            slope, loss[victims, restarts] = self._part(variables, victims, restarts)
            for k, g in slope.items():
                slopes[k][victims, restarts] = g
        return loss, slopes

    def losses(self, variables: Variables) -> Tensor:
        """The losses [V, T] alone, for a third of the work; T: any number of candidates with the same labels."""
        if not self.arithmetic.plain:  # one program for both, so that they can be compared
            return self.evaluate(variables)[0]
        V, T = variables["pixels"].shape[:2]
        loss = variables["pixels"].new_empty(V, T)
        for victims, restarts in chunks(V, T, self.max_batch):
            loss[victims, restarts] = self._mapped(self.loss, *self._own(variables, victims, restarts))
        return loss

    @torch.no_grad()
    def fitted(self, variables: Variables, free: int | None = None) -> Group:
        """With the largest ``max_batch`` for ``free`` bytes (None: what the device has left now), by the tensors that
        the evaluation of one candidate needs.
        """
        one = peak_bytes(lambda: self._part(variables, slice(0, 1), slice(0, 1)))
        left = free_bytes(variables["pixels"].device) if free is None else free
        return dataclasses.replace(self, max_batch=largest_batch(one, left))

    @torch.no_grad()
    def computed(self, arithmetic: Arithmetic, start: Variables) -> Group:
        """With the quickest steps that are right (``_agrees_with``), and by ``arithmetic``, after that has been
        compared with the sure ones on the guesses ``start`` in the chunks that will be used. Raises ``ConfigError``
        where ``arithmetic`` differs, or where it cannot be had here.
        """
        like = start["pixels"]
        sure = dataclasses.replace(self, step=PLAIN.step(self._step, like))
        # a compiled program is made of the sure steps: it fuses what the quicker ones save
        ways = [] if arithmetic.compile else self._quicker(start)
        function = next((way for way in ways if sure._agrees_with(way, start)), self._step)
        chosen = dataclasses.replace(self, step=arithmetic.step(function, like), arithmetic=arithmetic)
        if not arithmetic.plain:
            arithmetic.compare(sure.evaluate(start), chosen.evaluate(start))
        return chosen

    def _quicker(self, start: Variables) -> list[Step]:
        """Steps that may be right, the quickest first.

        How wrong one backward pass through mapped normalisations is depends on the network's weights, and may be less
        than what single precision rounds: it is for networks without any, and for one candidate, which is not mapped.
        Layer by layer nothing is mapped either.
        """
        params, buffers = self.template.params, self.template.buffers
        V, T = start["pixels"].shape[:2]
        alone = self.max_batch == 1 or V == T == 1
        images = self.space.decode(start["pixels"][0, 0])
        ways: list[Step] = []
        if self.replay.multiple(self.template) is not None and (alone or explained(self.victim, params, buffers)):
            ways.append(self._layerwise_step)
        if alone or not normalises(lambda: self.victim.logits(params, buffers, images)):
            ways.append(self._quick_step)
        return ways

    def _agrees_with(self, way: Step, start: Variables) -> bool:
        """Whether ``way`` gives what this group's own steps give: on random guesses (at a special point all gradients
        might be 0) for at most two victims and restarts of a chunk."""
        V, T = start["pixels"].shape[:2]
        few, restarts = chunks(V, T, self.max_batch)[0]
        some, restarts = (slice(0, min(s.stop, size, 2)) for s, size in ((few, V), (restarts, T)))
        if some.stop == restarts.stop == 1 and (self.max_batch == 1 or V == T == 1):
            return True  # both are plain double backward passes
        draw = stream(0, "agreement")
        guesses = {k: torch.randn(v.shape, generator=draw).to(v) for k, v in start.items()}
        other = dataclasses.replace(self, step=PLAIN.step(way, start["pixels"]))
        (slope, loss), (others, other_loss) = (group._part(guesses, some, restarts) for group in (self, other))
        telling = all(bool(g.isfinite().all() and g.any()) for g in slope.values())
        allowed = PRECISIONS["fp32"] if loss.dtype == torch.float32 else 1e-9
        return telling and farthest((loss, slope), (other_loss, others)).error <= allowed

    def _part(self, variables: Variables, victims: slice | Tensor, restarts: slice) -> tuple[Variables, Tensor]:
        """Gradients and losses of some victims and restarts."""
        step = self._step if self.step is None else self.step
        return step(*self._own(variables, victims, restarts))

    def _own(self, variables: Variables, victims: slice | Tensor, restarts: slice) -> tuple[Variables, Seen]:
        """What belongs to some victims and restarts."""
        T = variables["pixels"].shape[1]
        seen = Seen(*({k: v[victims] for k, v in s.items()} for s in self.seen))
        labels = {k: v.expand(-1, T, -1)[:, restarts] for k, v in seen.labels.items()}
        return {k: v[victims, restarts] for k, v in variables.items()}, seen._replace(labels=labels)

    def _step(self, variables: Variables, seen: Seen) -> tuple[Variables, Tensor]:
        """The sure way: vmap(grad(loss)), right through every layer; a test holds it against finite differences."""
        result: tuple[Variables, Tensor] = self._mapped(grad_and_value(self.loss), variables, seen)
        return result

    def _quick_step(self, variables: Variables, seen: Seen) -> tuple[Variables, Tensor]:
        """One backward pass through vmap(loss), a fifth to a third less time. Through normalisations that are mapped
        its second derivative is silently wrong (torch 2.15): see ``_quicker``."""
        return _backward(variables, lambda leaves: self._mapped(self.loss, leaves, seen))

    def _layerwise_step(self, variables: Variables, seen: Seen) -> tuple[Variables, Tensor]:
        """One backward pass through all dummy updates, which are found layer by layer, and what is made of them: also
        at once, where all parts of the loss can do that."""
        of_many = getattr(self.distance, "of_many", None)  # see OfMany
        simple = self.template.defense is None and not self.constraints
        if of_many and simple and all(prior.leading_axes for prior in self.priors.values()):
            return _backward(
                variables, lambda leaves: self._at_once(self._candidate(leaves, seen), seen.update, of_many)
            )
        return _backward(
            variables,
            lambda leaves: self._mapped(self.loss, leaves, seen, self._dummies(self._candidate(leaves, seen))),
        )

    def _dummies(self, candidate: Candidate) -> Update:
        """The updates of all candidates [V, T, ...], where they are multiples of one gradient."""
        shared, (V, T, B) = self.template, candidate.pixels.shape[:3]
        inputs, labels = candidate.inputs.flatten(0, 1), candidate.labels.flatten(0, 1)
        batch = Batch(inputs, labels, candidate.pixels.new_ones(V * T, B))
        found, factor = gradients(self.victim, shared.params, shared.buffers, batch), self.replay.multiple(shared)
        assert factor is not None, "else this way is not taken"
        return {k: (g if factor == 1 else g * factor).view(V, T, *g.shape[1:]) for k, g in found.items()}

    def _at_once(self, candidate: Candidate, observed: Update, distances: Distance) -> Tensor:
        """The losses [V, T] of parts that take all candidates as they are."""
        unit, scene = update_unit(self.template), Scene(self.victim, self.template)
        loss = distances(_in_units(self._dummies(candidate), unit), _in_units(observed, unit))
        return sum((prior(candidate, scene) for prior in self.priors.values()), loss)

    def _mapped(self, one: Callable[..., Any], variables: Variables, seen: Seen, dummies: Update | None = None) -> Any:
        """``one``, which is asked like ``loss``, for every candidate [V, T]."""
        V, T = variables["pixels"].shape[:2]

        def victim(variables: Variables, seen: Seen, buffers: Buffers, dummies: Update) -> Any:
            def restart(variables: Variables, labels: dict[str, Tensor], buffers: Buffers, dummy: Update) -> Any:
                return one(variables, seen._replace(labels=labels), buffers, dummy)

            return mapped_over(T, restart)(variables, seen.labels, buffers, dummies)

        # BatchNorm writes its statistics in place, which vmap allows only into tensors that are mapped too
        buffers = {k: v.expand(V, T, *v.shape) for k, v in self.template.buffers.items()}
        return mapped_over(V, victim)(variables, seen, buffers, dummies or {})


def _backward(variables: Variables, losses: Callable[[Variables], Tensor]) -> tuple[Variables, Tensor]:
    """The gradients of ``losses`` [V, T], of which none depends on another candidate's variables, and the losses."""
    with torch.enable_grad():
        leaves = {k: v.detach().requires_grad_() for k, v in variables.items()}
        loss = losses(leaves)
        if not loss.requires_grad:  # it depends on no variable
            return {k: torch.zeros_like(v) for k, v in variables.items()}, loss
        slopes = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, slopes, strict=True)), loss.detach()


def _in_units(update: Update, unit: float) -> Update:
    return update if unit == 1 else {k: v / unit for k, v in update.items()}
