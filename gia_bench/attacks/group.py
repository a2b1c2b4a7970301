"""Victims that share the model and the batch size, as one function of all their candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_map

from gia_bench.attacks.adaptive import Constraint, Informed
from gia_bench.attacks.arithmetic import PLAIN, PRECISIONS, Arithmetic, Step, farthest, normalises
from gia_bench.attacks.distances import Distance
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
        first = observations[0]
        params = {k: v.detach() for k, v in first.params.items()}
        # an attacker who is not shown the statistics has those of the model as it is published
        buffers = {**victim.initial()[1], **first.buffers}
        device = next(iter(params.values())).device
        buffers = {k: v.to(device) for k, v in buffers.items()}
        seen = Seen(
            update=_stack([o.update for o in observations], device),
            sent_buffers=_stack([o.sent_buffers or {} for o in observations], device),
            shown_labels=_stack([{} if o.labels is None else {"labels": o.labels} for o in observations], device),
            labels=_stack([{} if y is None else {"labels": y if y.ndim == 2 else y[None]} for y in labels], device),
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

    def loss(self, variables: Variables, seen: Seen, buffers: Buffers) -> Tensor:
        """The loss of one candidate of one victim (scalar)."""
        observation = dataclasses.replace(
            self.template,
            buffers=buffers,
            update=seen.update,
            sent_buffers=seen.sent_buffers or None,
            labels=seen.shown_labels.get("labels"),
        )
        scene = Scene(self.victim, observation)
        pixels = variables["pixels"]
        labels = variables["labels"].softmax(-1) if "labels" in variables else seen.labels["labels"]
        candidate = Candidate(pixels, self.space.decode(pixels), labels)
        dummy = self.replay.update(Batch(candidate.inputs, labels, pixels.new_ones(len(pixels))), scene)
        unit = update_unit(observation)
        sent = dummy if observation.defense is None else observation.defense.surrogate(dummy, observation)
        distance = self.distance(_in_units(sent, unit), _in_units(observation.update, unit))
        parts = [prior(candidate, scene) for prior in self.priors.values()]
        parts += [constraint(dummy, observation, unit) for constraint in self.constraints.values()]
        return sum(parts, distance + self.replay.penalty(candidate, scene))

    def evaluate(self, variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        """The losses [V, T] and their gradients, ``max_batch`` candidates at a time; see ``Evaluate``."""
        pixels = variables["pixels"]
        V, T = pixels.shape[:2]
        rows = torch.arange(V, device=pixels.device)
        # a compiled step would be compiled again for every number of victims
        if wanted is not None and pixels.device.type == "cpu" and not self.arithmetic.compile:
            rows = rows[wanted.any(1)]
        chunks = _chunks(len(rows), T, self.max_batch)
        if len(rows) == V and len(chunks) == 1:
            gradients, loss = self._part(variables, *chunks[0])
            return loss, gradients
        loss, gradients = pixels.new_full((V, T), torch.inf), {k: torch.zeros_like(v) for k, v in variables.items()}
        for few, restarts in chunks:
            victims = few if len(rows) == V else rows[few]  # a slice copies nothing
            gradient, loss[victims, restarts] = self._part(variables, victims, restarts)
            for k, g in gradient.items():
                gradients[k][victims, restarts] = g
        return loss, gradients

    def losses(self, variables: Variables) -> Tensor:
        """The losses [V, T] alone, for a third of the work; T: any number of candidates with the same labels."""
        if not self.arithmetic.plain:  # one program for both, so that they can be compared
            return self.evaluate(variables)[0]
        V, T = variables["pixels"].shape[:2]
        loss = variables["pixels"].new_empty(V, T)
        for victims, restarts in _chunks(V, T, self.max_batch):
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
        """With the quicker steps where they are right (``_agrees_with``), and by ``arithmetic``, after that has been
        compared with the sure ones on the guesses ``start`` in the chunks that will be used. Raises ``ConfigError``
        where ``arithmetic`` differs, or where it cannot be had here.
        """
        sure, quick = (
            dataclasses.replace(self, step=PLAIN.step(function, start["pixels"]))
            for function in (self._step, self._quick_step)
        )
        agree = sure._agrees_with(quick, start)
        if arithmetic.plain:
            return quick if agree else sure
        # a compiled program is made of the sure steps: it fuses what the quicker ones save
        function = self._quick_step if agree and not arithmetic.compile else self._step
        step = arithmetic.step(function, start["pixels"])
        other = dataclasses.replace(self, step=step, arithmetic=arithmetic)
        arithmetic.compare(sure.evaluate(start), other.evaluate(start))
        return other

    def _agrees_with(self, other: Group, start: Variables) -> bool:
        """Whether ``other``, whose steps are the quicker ones, may be used.

        Where nothing is mapped, both are plain double backward passes. Else there must be no normalisation in the
        network: how wrong the quicker gradient then is depends on its weights, and may be less than what single
        precision rounds. Against what is not known yet the two are compared, on random guesses (at a special point all
        gradients might be 0) for at most two victims and restarts of a chunk.
        """
        V, T = start["pixels"].shape[:2]
        few, restarts = _chunks(V, T, self.max_batch)[0]
        some, restarts = (slice(0, min(s.stop, size, 2)) for s, size in ((few, V), (restarts, T)))
        if some.stop == restarts.stop == 1 and (self.max_batch == 1 or V == T == 1):
            return True
        draw = stream(0, "agreement")
        guesses = {k: torch.randn(v.shape, generator=draw).to(v) for k, v in start.items()}
        images, buffers = self.space.decode(guesses["pixels"][0, 0]), self.template.buffers
        if normalises(lambda: self.victim.logits(self.template.params, buffers, images)):
            return False
        (slope, loss), (others, other_loss) = (group._part(guesses, some, restarts) for group in (self, other))
        telling = all(bool(g.isfinite().all() and g.any()) for g in slope.values())
        return telling and farthest((loss, slope), (other_loss, others)).error <= PRECISIONS["fp32"]

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
        its second derivative is silently wrong (torch 2.15): see ``_agrees_with``."""
        with torch.enable_grad():
            leaves = {k: v.detach().requires_grad_() for k, v in variables.items()}
            loss = self._mapped(self.loss, leaves, seen)
            if not loss.requires_grad:  # it depends on no variable
                return {k: torch.zeros_like(v) for k, v in variables.items()}, loss
            # no candidate's loss depends on another one's variables
            slopes = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, slopes, strict=True)), loss.detach()

    def _mapped(self, one: Callable[..., Any], variables: Variables, seen: Seen) -> Any:
        """``one``, which is asked like ``loss``, for every candidate [V, T]."""
        V, T = variables["pixels"].shape[:2]

        def victim(variables: Variables, seen: Seen, buffers: Buffers) -> Any:
            def restart(variables: Variables, labels: dict[str, Tensor], buffers: Buffers) -> Any:
                return one(variables, seen._replace(labels=labels), buffers)

            return _mapped_over(T, restart)(variables, seen.labels, buffers)

        # BatchNorm writes its statistics in place, which vmap allows only into tensors that are mapped too
        buffers = {k: v.expand(V, T, *v.shape) for k, v in self.template.buffers.items()}
        return _mapped_over(V, victim)(variables, seen, buffers)


def _mapped_over(size: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for every row of its arguments. An axis of one is not mapped: every layer of vmap takes time with
    every operation, and below none a wide network's kernels are faster."""
    if size > 1:
        return vmap(function)
    return lambda *rows: tree_map(lambda t: t[None], function(*tree_map(lambda t: t[0], rows)))


def _stack(dicts: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    return {k: torch.stack([d[k].detach().to(device) for d in dicts]) for k in dicts[0]}


def _in_units(update: Update, unit: float) -> Update:
    return update if unit == 1 else {k: v / unit for k, v in update.items()}


def _chunks(V: int, T: int, max_batch: int | None) -> list[tuple[slice, slice]]:
    """Whole victims where their restarts fit, so that a target is used by all restarts at once; else single victims."""
    size = max_batch or V * T
    rows, columns = max(size // T, 1), min(T, size)
    return [(slice(v, v + rows), slice(t, t + columns)) for v in range(0, V, rows) for t in range(0, T, columns)]
