"""L-BFGS for many candidates at once, equal to ``torch.optim.LBFGS`` for each of them.

N candidates are rows of n numbers. Each has a history of its own: m pairs (s, y), filled as a ring, written only where
that candidate's curvature test passes. A candidate that meets a stopping rule is masked until the next outer step,
where it is evaluated and tries again, as the reference does when ``step`` is called again.

The two-loop recursion is written as two triangular solves with R = triu(S Y^T) (Byrd, Nocedal and Schnabel 1994), so
that a direction reads the histories four times instead of making 2 m dependent passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from gia_bench.attacks.checks import check
from gia_bench.attacks.line_search import Points, Searches, choose
from gia_bench.attacks.optimizers import Evaluate, Moment, Move, Optimizer, Variables
from gia_bench.errors import ConfigError, choices
from gia_bench.values import State

LINE_SEARCHES = ("none", "strong_wolfe")

Ask: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""(x [N, n], wanted [N] or None) -> losses [N], gradients [N, n]."""


@final
@dataclass(frozen=True, kw_only=True)
class LBFGS(Optimizer):
    """L-BFGS; one step is an outer step of up to ``max_iter`` iterations and ``max_eval`` evaluations.

    lr: step length (with a line search: of its first trial); max_iter: inner iterations per step; max_eval: evaluations
    per step, torch's own default is max_iter * 5 // 4; line_search: none | strong_wolfe; history: pairs kept (memory:
    2 * history numbers per variable and candidate); tolerance_grad, tolerance_change: torch's stopping rules within one
    outer step.
    """

    lr: float = 1.0
    max_iter: int = 20
    max_eval: int = 25
    line_search: str = "none"
    history: int = 100
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9

    def __post_init__(self) -> None:
        check(self.lr > 0, "lbfgs.lr", self.lr, "a number above 0")
        check(self.max_iter >= 1, "lbfgs.max_iter", self.max_iter, "at least 1")
        check(self.max_eval >= 1, "lbfgs.max_eval", self.max_eval, "at least 1")
        if self.line_search not in LINE_SEARCHES:
            raise ConfigError(choices("lbfgs.line_search", self.line_search, LINE_SEARCHES))
        check(self.history >= 1, "lbfgs.history", self.history, "at least 1")
        check(self.tolerance_grad >= 0, "lbfgs.tolerance_grad", self.tolerance_grad, "at least 0")
        check(self.tolerance_change >= 0, "lbfgs.tolerance_change", self.tolerance_change, "at least 0")

    def init(self, variables: Variables) -> State:
        x = _flat(variables)
        (N, n), m = x.shape, self.history
        return {
            "s": x.new_zeros(N, m, n),
            "y": x.new_zeros(N, m, n),
            "sy": x.new_zeros(N, m, m),  # sy[:, i, j] = s_i . y_j, by place in the ring
            "count": torch.zeros(N, dtype=torch.int64, device=x.device),  # pairs ever stored
            "iterations": torch.zeros(N, dtype=torch.int64, device=x.device),
            "gamma": x.new_ones(N),  # scale of the initial inverse Hessian
            "direction": torch.zeros_like(x),
            "length": x.new_zeros(N),
            "gradient": torch.zeros_like(x),  # of the iteration before
        }

    def step(self, variables: Variables, state: State, evaluate: Evaluate, moment: Moment) -> Move:
        shape = next(iter(variables.values())).shape[:2]

        def value_and_gradient(x: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
            loss, gradient = evaluate(_unflat(x, variables), None if wanted is None else wanted.view(shape))
            return loss.flatten(), _flat(gradient)

        state = dict(state)
        start = _flat(variables)
        loss, g = value_and_gradient(start)
        walk = self._stride if self.line_search == "none" else self._search
        x = walk(state, start, loss, g, value_and_gradient, moment)
        # the same x gives the same gradient, y = 0, no new pair and the same direction: nothing will ever change
        settled = (x == start).all(1)
        if self.line_search != "none":  # a search that found nothing may find something at another learning rate
            flat = (g * state["direction"]).sum(1) > -self.tolerance_change
            settled = settled & (flat | (g.abs().amax(1) <= self.tolerance_grad))
        return Move(loss.view(shape), _unflat(x, variables), state, settled.view(shape))

    def _stride(self, state: State, x: Tensor, loss: Tensor, g: Tensor, ask: Ask, moment: Moment) -> Tensor:
        """Where x is after the iterations of one step, each a stride of fixed length. Writes into ``state``."""
        active = ~(g.abs().amax(1) <= self.tolerance_grad)
        # an iteration costs one evaluation, beside the first one, and torch always makes one
        rounds = min(self.max_iter, max(self.max_eval - 1, 1))
        for i in range(rounds):
            self._aim(state, g, active, moment, i)
            active = active & ~((g * state["direction"]).sum(1) > -self.tolerance_change)
            stride = state["length"][:, None] * state["direction"]
            x = torch.where(active[:, None], x + stride, x)
            if i + 1 == rounds or _none_left(active):
                break
            new_loss, new_g = ask(x, active)
            done = self._done(new_g, stride, new_loss - loss)
            loss, g = torch.where(active, new_loss, loss), torch.where(active[:, None], new_g, g)
            active = active & ~done
        return x

    def _search(self, state: State, x: Tensor, loss: Tensor, g: Tensor, ask: Ask, moment: Moment) -> Tensor:
        """Where x is after the iterations of one step, each a line search. Writes into ``state``.

        One evaluation per turn: some candidates are in the middle of a search while others begin their next one.
        """
        active = fresh = ~(g.abs().amax(1) <= self.tolerance_grad)
        iterations, evaluations = torch.zeros_like(state["count"]), torch.ones_like(state["count"])
        searches: Searches | None = None
        for turn in range(self.max_eval):
            if not _none_left(fresh):
                self._aim(state, g, fresh, moment, min(turn, self.max_iter))
                active = active & ~(fresh & ((g * state["direction"]).sum(1) > -self.tolerance_change))
                begun = Searches.begin(state["length"], self.max_eval - evaluations, loss, g, state["direction"])
                searches = begun if searches is None else choose(fresh, begun, searches)
            if searches is None or _none_left(active):
                break
            d, trial = state["direction"], searches.trial
            new_loss, new_g = ask(x + trial[:, None] * d, active)
            point = Points(trial, new_loss, (new_g * d).sum(1), new_g)
            searches, finished = searches.receive(point, self.tolerance_change)
            finished = finished & active

            found, before = searches.low, loss
            stride = found.length[:, None] * d
            x = torch.where(finished[:, None], x + stride, x)
            state["length"] = torch.where(finished, found.length, state["length"])
            loss, g = torch.where(finished, found.loss, loss), torch.where(finished[:, None], found.gradient, g)
            iterations, evaluations = iterations + finished, evaluations + finished * searches.tries
            done = self._done(g, stride, loss - before)
            done |= (iterations >= self.max_iter) | (evaluations >= self.max_eval)
            active = active & ~(finished & done)
            fresh = finished & active
        return x

    def _aim(self, state: State, g: Tensor, who: Tensor, moment: Moment, i: int) -> None:
        """The direction and the first length of the next iteration of ``who`` [N], in ``state``. i: iterations of this
        step that anyone may have made.
        """
        # known without asking the device: nobody can have stored more pairs than there were iterations
        used = min(self.history, moment.step * self.max_iter + i)
        state["iterations"] = state["iterations"] + who
        direction = self._direction(state, g, who, used)
        first = (1 / g.abs().sum(1)).clamp(max=1)
        rate = moment.rate.flatten() if isinstance(moment.rate, Tensor) else moment.rate
        length = torch.where(state["iterations"] == 1, first, 1.0) * self.lr * rate
        state["direction"] = torch.where(who[:, None], direction, state["direction"])
        state["length"] = torch.where(who, length, state["length"])
        state["gradient"] = torch.where(who[:, None], g, state["gradient"])

    def _done(self, g: Tensor, stride: Tensor, gain: Tensor) -> Tensor:
        """torch's three reasons to end a step, after a stride: a flat place, no way made, nothing gained."""
        done = g.abs().amax(1) <= self.tolerance_grad
        done |= stride.abs().amax(1) <= self.tolerance_change
        return done | (gain.abs() < self.tolerance_change)

    def _direction(self, state: State, g: Tensor, active: Tensor, used: int) -> Tensor:
        """-H g, after storing the newest pair where its curvature is positive. Writes into ``state``."""
        if used == 0:
            return -g
        place = state["count"] % self.history
        y, s = g - state["gradient"], state["direction"] * state["length"][:, None]
        curvature = (y * s).sum(1)
        store = active & (state["iterations"] > 1) & (curvature > 1e-10)
        _write(state["y"], place, y, store)
        _write(state["s"], place, s, store)
        state["count"] = state["count"] + store
        state["gamma"] = torch.where(store, curvature / (y * y).sum(1), state["gamma"])

        S, Y, q = state["s"][:, :used], state["y"][:, :used], -g
        Sy, Sq = (torch.stack([y, q], 1) @ S.mT).unbind(1)
        column = Sy.scatter(1, place[:, None], curvature[:, None])
        _write(state["sy"].mT[..., :used], place, column, store)

        age = torch.arange(used, device=g.device)
        oldest = torch.where(state["count"] >= self.history, state["count"] % self.history, 0)
        order = (oldest[:, None] + age) % used  # a ring that is not full yet starts at 0
        R = state["sy"][:, :used, :used].gather(1, order[:, :, None].expand(-1, -1, used))
        R = R.gather(2, order[:, None, :].expand(-1, used, -1))
        # empty places hold zeros everywhere; a one on the diagonal leaves them without effect
        D = torch.where(age < state["count"][:, None], R.diagonal(dim1=1, dim2=2), 1.0)
        R = torch.diagonal_scatter(R, D, dim1=1, dim2=2)

        alpha = torch.linalg.solve_triangular(R, Sq.gather(1, order)[..., None], upper=True)[..., 0]
        r = (q - _combine(alpha, order, Y)) * state["gamma"][:, None]
        Yr = (r[:, None] @ Y.mT)[:, 0].gather(1, order)
        c = torch.linalg.solve_triangular(R.mT, (D * alpha - Yr)[..., None], upper=False)[..., 0]
        return r + _combine(c, order, S)


def _none_left(who: Tensor) -> bool:
    """Whether ``who`` is known to be empty. On the CPU it costs nothing to ask; elsewhere the masks do the same."""
    return who.device.type == "cpu" and not bool(who.any())


def _flat(variables: Variables) -> Tensor:
    return torch.cat([v.flatten(2) for v in variables.values()], 2).flatten(0, 1)


def _unflat(x: Tensor, like: Variables) -> Variables:
    parts = torch.split(x, [v[0, 0].numel() for v in like.values()], 1)
    return {k: part.reshape(v.shape) for (k, v), part in zip(like.items(), parts, strict=True)}


def _write(rows: Tensor, place: Tensor, new: Tensor, where: Tensor) -> None:
    """rows[i, place[i]] = new[i] for every candidate i with where[i], in place: the histories are large."""
    every = torch.arange(len(rows), device=rows.device)
    rows[every, place] = torch.where(where[:, None], new, rows[every, place])


def _combine(weights: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    """The sum of rows [N, m, n], weighted by weights [N, m] that are given in the order of age."""
    return (torch.zeros_like(weights).scatter(1, order, weights)[:, None] @ rows)[:, 0]
