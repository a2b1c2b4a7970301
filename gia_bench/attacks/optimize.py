"""The engine: many candidates, one loop, best iterates, and a state that outlives the process.

Axes: V victims, T restarts. Inside the loop nothing waits for the device; that happens every ``snapshot_every`` steps.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from gia_bench.attacks.base import Snapshots
from gia_bench.attacks.optimizers import Evaluate, Moment, Optimizer, Variables
from gia_bench.attacks.schedules import Schedule
from gia_bench.attacks.telling import Telling
from gia_bench.values import State

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Progress:
    """Everything that changes during a search. best: the variables [V, T, ...] with the lowest loss seen, best_loss
    [V, T] (infinite: never finite); frozen [V, T] bool: candidates that stay as they are from here on; diverged [V, T]
    bool: those among them whose next step would have left the numbers.
    """

    step: int
    variables: Variables
    best: Variables
    best_loss: Tensor
    frozen: Tensor
    diverged: Tensor
    optimizer: State

    def pack(self) -> dict[str, Any]:
        """A copy on the host, flat and by name."""
        parts = {"variables": self.variables, "best": self.best, "optimizer": self.optimizer}
        parts["search"] = {"best_loss": self.best_loss, "frozen": self.frozen, "diverged": self.diverged}
        packed = {f"{part}/{k}": v.to("cpu", copy=True) for part, tensors in parts.items() for k, v in tensors.items()}
        return {"step": self.step, **packed}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any], device: torch.device) -> Progress:
        """The inverse of ``pack``, in tensors of its own."""

        def part(name: str) -> dict[str, Tensor]:
            return {
                k.removeprefix(f"{name}/"): v.to(device, copy=True)
                for k, v in packed.items()
                if k.startswith(f"{name}/")
            }

        return cls(
            step=packed["step"],
            variables=part("variables"),
            best=part("best"),
            optimizer=part("optimizer"),
            **part("search"),
        )


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Search:
    """One search. push: what is added to the gradient of the pixels, asked once a step (None: nothing); clamp: applied
    to the variables after each step; stop_below: a candidate whose loss falls below stays as it is (None: never);
    snapshot_every: steps between two looks from the host; losses: what ``evaluate`` gives, without the gradients, for
    the last look (None: ``evaluate`` itself).
    """

    evaluate: Evaluate
    push: Callable[[Tensor, Moment], Tensor] | None
    optimizer: Optimizer
    schedule: Schedule
    clamp: Callable[[Variables], Variables]
    steps: int
    stop_below: float | None
    snapshot_every: int
    losses: Callable[[Variables], Tensor] | None = None

    @torch.no_grad()
    def run(self, start: Variables, snapshots: Snapshots, key: str) -> Progress:
        """From ``start``, or from where a killed run left it, to the end."""
        some = next(iter(start.values()))
        packed = snapshots.load(key)
        now = self._begin(start) if packed is None else Progress.unpack(packed, some.device)
        telling = Telling()
        while now.step < self.steps:
            now = self._advance(now)
            if now.step % self.snapshot_every == 0 or now.step == self.steps:
                snapshots.save(key, now.pack())
                if bool(now.frozen.all()):
                    break
                if telling.due():
                    log.info(
                        "step %d of %d: the lowest loss so far is %.3g in the median, %d of %d candidates are at rest",
                        now.step, self.steps, now.best_loss.median(), now.frozen.sum(), now.frozen.numel(),
                    )  # fmt: skip
        self._tell_who_never_moved(start, now)
        # the last step's result has not been looked at yet
        return _keep_best(now, self.losses(now.variables) if self.losses else self.evaluate(now.variables)[0])

    def _tell_who_never_moved(self, start: Variables, now: Progress) -> None:
        still = torch.stack([(v == start[k]).flatten(2).all(2) for k, v in now.variables.items()]).all(0)
        if count := int((still & ~now.diverged).sum()):
            log.warning(
                "%d of %d candidates never left where they began and return it: the loss is flat there, or too flat "
                "for the optimizer (L-BFGS: tolerance_grad), or below stop_below. If the distance is only small, lower "
                "these, or multiply it (gia_bench.attacks.wrapped.Scaled).",
                count, still.numel(),
            )  # fmt: skip

    def _begin(self, start: Variables) -> Progress:
        some = next(iter(start.values()))
        return Progress(
            step=0,
            variables=start,
            best=start,
            best_loss=some.new_full(some.shape[:2], torch.inf),
            frozen=torch.zeros(some.shape[:2], dtype=torch.bool, device=some.device),
            diverged=torch.zeros(some.shape[:2], dtype=torch.bool, device=some.device),
            optimizer=self.optimizer.init(start),
        )

    def _advance(self, now: Progress) -> Progress:
        moment, moving = Moment(now.step, self.steps, self.schedule(now.step, self.steps)), ~now.frozen
        push = None if self.push is None else self.push(now.variables["pixels"], moment)

        def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
            loss, gradient = self.evaluate(variables, moving if wanted is None else moving & wanted)
            return loss, gradient if push is None else {**gradient, "pixels": gradient["pixels"] + push}

        move = self.optimizer.step(now.variables, now.optimizer, evaluate, moment)
        now = _keep_best(now, move.loss)
        proposed = self.clamp(move.variables)
        # the largest magnitude is no number where one of them is none
        dead = torch.stack([~v.flatten(2).abs().amax(2).isfinite() for v in proposed.values()]).any(0)
        frozen = now.frozen | move.settled | dead
        if self.stop_below is not None:
            frozen = frozen | (now.best_loss < self.stop_below)
        return dataclasses.replace(
            now,
            step=now.step + 1,
            variables=_select(frozen, now.variables, proposed),
            frozen=frozen,
            diverged=now.diverged | (dead & moving),
            optimizer=move.state,
        )


def _keep_best(now: Progress, loss: Tensor) -> Progress:
    """``loss`` belongs to ``now.variables``; what is not finite never is the best."""
    better = loss.isfinite() & (loss < now.best_loss)
    best = _select(better, now.variables, now.best)
    return dataclasses.replace(now, best=best, best_loss=torch.where(better, loss, now.best_loss))


def _select(where: Tensor, yes: Variables, no: Variables) -> Variables:
    """``yes`` for the candidates [V, T] with ``where``, else ``no``."""
    return {k: torch.where(where.view(*where.shape, *[1] * (v.ndim - 2)), v, no[k]) for k, v in yes.items()}
