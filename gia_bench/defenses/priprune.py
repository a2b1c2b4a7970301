"""PriPrune: the most telling changes stay with the client, in a local model of its own that goes on learning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.priprune_masks import Choice, DefenseMask, LearnedRates
from gia_bench.defenses.selection import on_support
from gia_bench.errors import ConfigError, choices
from gia_bench.values import Batch, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import SPARSE, Codec

WITHHELD, RATE = "withheld.", "pruning_rate"
SENSITIVITIES = ("update", "gradient")


@final
@dataclass(frozen=True, kw_only=True)
class PriPrune(Defense):
    """A mask of each client's own, after any base pruning (Chu et al., TOMPECS 2024; compose it with ``pruning=``).

    With W the change that the client has withheld so far (0 at first) and u this round's update,

        local work starts from   broadcast - scale W
        change                   U = W + u         (local change since the broadcast, exactly)
        sent                     U where the mask lets it pass, +0 elsewhere
        withheld from now on     U where it does not, 0 elsewhere

    so nothing is lost, and what is withheld is trained on locally ("pseudo-pruning"): error feedback whose residual the
    client also sees while it trains. An entry that passes takes with it what was withheld of it before. scale is 1
    where an update is a change of weights (FedAvg), and ``gradient_step`` where it is a gradient (FedSGD), which has no
    step of its own. A base pruning that changes its masks takes what is withheld off the new mask with it. NaN and
    infinity are always sent, so that the server sees a broken client.

    mask: how the mask is chosen, by ``sensitivity``: the magnitude of this round's "update" (under FedSGD the gradient
    itself), or that of the "gradient" at the weights the local work started from, on its first step's examples (one
    more pass). pseudo_pruning: False removes what is withheld, as the control; gradient_step: >= 0, give the server's
    learning rate.

    The authors' code is not public and their update rule is known in words; the equations above are a gia_bench choice.
    After its first round a client's gradients are not those of the broadcast model: an attack that fails in a later
    round may have failed for that, and not for the mask.

    State: ``withheld.<parameter>`` like the parameter, ``pruning_rate`` (float32 [1]: the share of the entries with
    a change that was withheld last), and the mask's own.
    """

    mask: DefenseMask = field(default_factory=LearnedRates)
    sensitivity: str = "update"
    pseudo_pruning: bool = True
    gradient_step: float = 0.1

    def __post_init__(self) -> None:
        if self.sensitivity not in SENSITIVITIES:
            raise ConfigError(choices("defense priprune: sensitivity", self.sensitivity, SENSITIVITIES))
        if not isinstance(self.pseudo_pruning, bool):
            raise ConfigError(f"defense priprune: pseudo_pruning={self.pseudo_pruning!r} must be true or false.")
        check(
            "defense priprune: gradient_step", self.gradient_step, lambda s: 0 <= s < math.inf,
            "be finite and at least 0",
        )  # fmt: skip

    @property
    def codec(self) -> Codec:
        """Values and their positions."""
        return SPARSE

    def init_client(self, like: Params) -> State:
        """Nothing withheld."""
        local = {WITHHELD + k: torch.zeros_like(p) for k, p in like.items()} if self.pseudo_pruning else {}
        return local | {RATE: torch.zeros(1)} | self.mask.initial(like)

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """The mask's."""
        return self.mask.draw(like, generator)

    def start(self, client: Client, state: State, shared: Shared) -> Params:
        """The broadcast, and what was withheld on top of it."""
        if not self.pseudo_pruning:
            return client.params
        scale = self._scale(client)
        return {k: p - scale * state[WITHHELD + k] for k, p in client.params.items()}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """What passes of the update and of all that was withheld before."""
        before = {k: state[WITHHELD + k] if self.pseudo_pruning else torch.zeros_like(u) for k, u in update.items()}
        # not a plain sum: 0 + -0.0 is another bit pattern than the update's own
        change = {k: torch.where(before[k] == 0, u, before[k] + u) for k, u in update.items()}
        scale, first = self._scale(client), _first_step(client)

        def loss(sent: Update) -> Tensor:
            weights = {k: p + scale * (before[k] - sent[k] * change[k]) for k, p in client.params.items()}
            return client.victim.objective(weights, client.buffers, first)[0]

        choice = Choice(self._sensitivity(update, change, client, first), loss)
        stays, own = self.mask.withheld(choice, state, noise)
        stays = {k: m & change[k].isfinite() for k, m in stays.items()}
        sent = {k: torch.where(stays[k], 0, c) for k, c in change.items()}
        withheld = {WITHHELD + k: torch.where(stays[k], c, 0) for k, c in change.items()} if self.pseudo_pruning else {}
        return sent, withheld | {RATE: _share(stays, change)} | own

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update where the observed one is not zero."""
        return on_support(update, observation.update)

    def measure(self, state: State) -> dict[str, Tensor]:
        """``defense_pruning_rate``, and ``residual_norm``: Euclidean, of all that is withheld."""
        withheld = [torch.linalg.vector_norm(t.float()) for k, t in state.items() if k.startswith(WITHHELD)]
        norm = {"residual_norm": torch.linalg.vector_norm(torch.stack(withheld))} if withheld else {}
        return {"defense_pruning_rate": state[RATE][0]} | norm

    def _scale(self, client: Client) -> float:
        return self.gradient_step if client.learning_rate is None else 1.0

    def _sensitivity(self, update: Update, change: Update, client: Client, first: Batch) -> Update:
        if self.sensitivity == "update":
            return {k: u.abs() for k, u in update.items()}

        def loss(params: Params) -> Tensor:
            return client.victim.objective(params, client.buffers, first)[0]

        gradient = torch.func.grad(loss)(client.params)
        return {k: torch.where(change[k] != 0, g.abs(), 0) for k, g in gradient.items()}


def _first_step(client: Client) -> Batch:
    """Whose examples the mask is learned on; every client has one, of real examples (gia_bench choice)."""
    return Batch(*(t[0] for t in client.batch))


def _share(stays: dict[str, Tensor], change: Update) -> Tensor:
    """The share of the entries with a change that is withheld."""
    withheld = torch.stack([(m & (change[k] != 0)).count_nonzero() for k, m in stays.items()]).sum()
    present = torch.stack([c.count_nonzero() for c in change.values()]).sum()
    return (withheld / present.clamp(min=1)).float().view(1)
