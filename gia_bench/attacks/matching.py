"""Gradient matching: find the images whose update is the observed one. DLG, iDLG, Inverting Gradients are settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import TypedDict, final

import torch
from torch import Tensor

from gia_bench.attacks.adaptive import Constraint
from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.distances import Distance
from gia_bench.attacks.forces import Course, Force
from gia_bench.attacks.group import STEPS, Group
from gia_bench.attacks.initial import GivenImage, Initial, Randn
from gia_bench.attacks.joint import AllRounds, joined
from gia_bench.attacks.labels import METHODS
from gia_bench.attacks.optimize import Progress, Search
from gia_bench.attacks.optimizers import Moment, Optimizer, Variables
from gia_bench.attacks.priors import Prior
from gia_bench.attacks.replay import Replay
from gia_bench.attacks.scene import PixelSpace
from gia_bench.attacks.schedules import Constant, Schedule
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.seeding import derive, stream
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Reconstruction

ROUNDS = ("one", "joint")


class Parts(TypedDict, total=False):
    """The fields of ``GradientMatching``: what a paper's settings give, and what is put in their place."""

    distance: Distance
    optimizer: Optimizer
    initial: Initial
    priors: Mapping[str, Prior]
    constraints: Mapping[str, Constraint]
    forces: Mapping[str, Force]
    replay: Replay
    rounds: str
    schedule: Schedule
    labels: str
    steps: int
    restarts: int
    boxed: bool
    stop_below: float | None
    max_batch: int | str | None
    arithmetic: Arithmetic
    snapshot_every: int


@final
@dataclass(frozen=True, kw_only=True)
class GradientMatching(Attack):
    """Minimise distance(dummy update, observed update) + priors over images, for all victims and restarts at once.

    distance, priors, constraints, optimizer, forces, schedule, initial: the parts; replay: how a guess becomes the
    update of several local steps; rounds: "one" for the attacked round alone, "joint" for the mean of all that were
    attacked so far (``joint.joined``); labels: how labels are found, one of ``labels.METHODS``; steps, restarts: at
    least 1; boxed: images are clamped to [0, 1] after each step; stop_below: a candidate whose loss falls below rests
    (None: never); max_batch: candidates evaluated at once, None for all, "auto" for as many as the free memory holds at
    the start (the same numbers, less memory); arithmetic: compiled or not, and the precision; snapshot_every: steps
    between two snapshots, and between two looks whether all rest.

    Every restart keeps its best iterate with that iterate's own loss; the restart with the lowest loss is returned. The
    loss is all that chooses: the truth is nowhere near. An update that was observed by an attacker who knows the
    defense is matched through ``defense.surrogate``.
    """

    distance: Distance
    optimizer: Optimizer
    initial: Initial
    priors: Mapping[str, Prior] = field(default_factory=dict)
    constraints: Mapping[str, Constraint] = field(default_factory=dict)
    forces: Mapping[str, Force] = field(default_factory=dict)
    replay: Replay = STEPS
    rounds: str = "one"
    schedule: Schedule = field(default_factory=Constant)
    labels: str = "auto"
    steps: int
    restarts: int = 1
    boxed: bool = False
    stop_below: float | None = None
    max_batch: int | str | None = None
    arithmetic: Arithmetic = PLAIN
    snapshot_every: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "priors", dict(self.priors))
        object.__setattr__(self, "constraints", dict(self.constraints))
        object.__setattr__(self, "forces", dict(self.forces))
        for name in ("steps", "restarts", "snapshot_every"):
            check(getattr(self, name) >= 1, f"attack.{name}", getattr(self, name), "at least 1")
        fine = self.max_batch >= 1 if isinstance(self.max_batch, int) else self.max_batch in (None, "auto")
        check(fine, "attack.max_batch", self.max_batch, "at least 1, or null, or auto")
        if self.labels not in METHODS:
            raise ConfigError(choices("attack.labels", self.labels, METHODS))
        if self.rounds not in ROUNDS:
            raise ConfigError(choices("attack.rounds", self.rounds, ROUNDS))
        if self.remembers and self.constraints:
            raise ConfigError(
                "attack.constraints bound what one round withholds, which says nothing of the mean of many; take them "
                "out, or set attack.rounds=one."
            )

    @property
    def remembers(self) -> bool:
        """Whether it needs the rounds before."""
        return self.rounds == "joint"

    @property
    def requires(self) -> Knowledge:
        shown = Knowledge.LABELS if self.labels == "known" else Knowledge.NONE
        return reduce(or_, (prior.requires for prior in self.priors.values()), Knowledge.NUM_EXAMPLES | shown)

    @property
    def max_examples(self) -> int | None:
        return 1 if self.labels == "idlg" else None

    def check_victim(self, victim: Victim) -> None:
        """Labels that are read off the last layer need a linear one."""
        if self.labels not in ("known", "joint") and victim.head is None:
            raise IncompatibleError(
                f"labels={self.labels} are read off the last linear layer, and this model has none; take labels=joint, "
                "or labels=known with a threat that shows them."
            )

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        if self.remembers:
            one = dataclasses.replace(self, rounds="one", replay=AllRounds(one=self.replay))
            return one.reconstruct_many(
                [joined(o, victim) for o in observations], victim, seeds=seeds, snapshots=snapshots
            )
        found: dict[int, Reconstruction] = {}
        for members in alike(observations, victim, self.priors):
            some, own_seeds = [observations[i] for i in members], [seeds[i] for i in members]
            found |= zip(members, self._reconstruct_group(some, victim, own_seeds, snapshots), strict=True)
        return [found[i] for i in range(len(observations))]

    def _reconstruct_group(
        self, observations: list[Observation], victim: Victim, seeds: list[int], snapshots: Snapshots
    ) -> list[Reconstruction]:
        like = next(iter(observations[0].params.values()))
        victim, space = victim.to(like.device), PixelSpace.of(victim, like)
        labels = [self._labels(o, victim, s) for o, s in zip(observations, seeds, strict=True)]
        number = self.max_batch if isinstance(self.max_batch, int) else None
        group = Group.of(
            observations, victim, labels, space, self.distance, self.priors, number,
            self.constraints, self.replay,
        )  # fmt: skip
        start = self._start(observations[0], victim, seeds, like, joint=labels[0] is None)
        if isinstance(self.initial, GivenImage):
            start["pixels"] = space.encode(start["pixels"])
        if self.max_batch == "auto":
            group = group.fitted(start)
        group = group.computed(self.arithmetic, start)
        search = Search(
            evaluate=group.evaluate,
            losses=group.losses,
            push=self._push(seeds) if self.forces else None,
            optimizer=self.optimizer,
            schedule=self.schedule,
            clamp=lambda v: {**v, "pixels": space.clamp(v["pixels"])} if self.boxed else v,
            steps=self.steps,
            stop_below=self.stop_below,
            snapshot_every=self.snapshot_every,
        )
        # repr holds every hyperparameter: the state of other settings or other victims is never picked up
        key = f"matching-{derive(0, repr(self), repr(kind(observations[0])[-1]), *seeds):016x}"
        end = search.run(start, snapshots, key)
        return [self._best_restart(end, v, o, labels[v], space) for v, o in enumerate(observations)]

    def _labels(self, observation: Observation, victim: Victim, seed: int) -> Tensor | None:
        """[T or 1, guesses] as the replay takes them, or None to search them."""
        found = METHODS[self.labels](observation, victim)
        return None if found is None else self.replay.arrange(found, observation, seed, self.restarts)

    def _start(
        self, observation: Observation, victim: Victim, seeds: list[int], like: Tensor, *, joint: bool
    ) -> Variables:
        """First guesses from the streams of each victim and restart, so that neither batch nor chunk matters."""
        B = (observation.num_examples or 0) * self.replay.copies(observation)

        def guess(name: str, initial: Initial, *shape: int) -> Tensor:
            streams = [[stream(seed, name, t) for t in range(self.restarts)] for seed in seeds]
            rows = [torch.stack([initial(shape, s, like.dtype) for s in row]) for row in streams]
            return torch.stack(rows).to(like.device)

        start = {"pixels": guess("initial", self.initial, B, *victim.input_shape)}
        # an image that all restarts start from must not make them start from one guess of the labels too
        return start | {"labels": guess("initial_labels", Randn(), B, victim.num_classes)} if joint else start

    def _push(self, seeds: Sequence[int]) -> Callable[[Tensor, Moment], Tensor]:
        def push(pixels: Tensor, moment: Moment) -> Tensor:
            course = Course(moment, self.optimizer.lr, seeds)
            return torch.stack([force(pixels, course) for force in self.forces.values()]).sum(0)

        return push

    def _best_restart(
        self, end: Progress, v: int, observation: Observation, labels: Tensor | None, space: PixelSpace
    ) -> Reconstruction:
        t = int(end.best_loss[v].argmin())
        score = float(end.best_loss[v, t])
        own = end.best["labels"][v, t].softmax(-1) if labels is None else labels[min(t, len(labels) - 1)]
        pixels, own = self.replay.merge(end.best["pixels"][v, t], own, observation)
        failure = None if score < torch.inf else why_never_finite(observation, self.restarts)
        return Reconstruction(
            inputs=space.decode(pixels),
            labels=own.argmax(-1) if labels is None else own,
            score=score,
            failure=failure,
            diverged=int(end.diverged[v].sum()),
        )


def alike(observations: Sequence[Observation], victim: Victim, priors: Mapping[str, Prior]) -> list[list[int]]:
    """Positions of the observations that are one batch. Raises ``IncompatibleError`` for one that cannot be matched,
    or that a prior refuses.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, observation in enumerate(observations):
        check_observation(observation, victim)
        for name, prior in priors.items():
            refusal = prior.refusal(observation, victim)
            if refusal is not None:
                raise IncompatibleError(f"priors.{name}: {refusal}")
        groups.setdefault(kind(observation), []).append(i)
    return list(groups.values())


def kind(observation: Observation) -> tuple[Hashable, ...]:
    """What must be the same for observations to be one batch; its last part is the same in any process."""
    o = observation
    tensors = tuple((k, id(v)) for shared in (o.params, o.buffers, o.shared) for k, v in shared.items())
    return (
        tensors,
        id(o.local),
        id(o.defense),
        o.labels is None,
        o.sent_buffers is None,
        tuple((id(e.local), *map(id, e.params.values())) for e in o.earlier),
        (o.num_examples, o.num_clients, len(o.earlier), *o.update),
    )


def check_observation(observation: Observation, victim: Victim) -> None:
    """Raises ``IncompatibleError`` for an observation in which there is nothing to match."""
    B, params = observation.num_examples, observation.params
    if B is None:
        raise IncompatibleError(
            "Gradient matching must know how many examples an update holds; take a threat that shows num_examples."
        )
    if not observation.update:
        raise IncompatibleError("The observed update holds no tensor, so there is nothing to match.")
    for name, tensor in observation.update.items():
        if name not in params or params[name].shape != tensor.shape:
            expected = tuple(params[name].shape) if name in params else "no such parameter"
            raise IncompatibleError(
                f"The observed update's {name!r} has shape {tuple(tensor.shape)}, the model's: {expected}; "
                "give the model that the client trained."
            )
    if observation.labels is not None and observation.labels.shape != (B,):
        raise IncompatibleError(f"The observed labels have shape {tuple(observation.labels.shape)}, expected ({B},).")


def why_never_finite(observation: Observation, restarts: int) -> str:
    """The reason for a victim without a finite loss."""
    broken = [name for name, t in observation.update.items() if not bool(t.isfinite().all())]
    if broken:
        return f"the observed update holds NaN or infinity in {', '.join(broken)}"
    return f"the loss was never finite in any of {restarts} restarts"
