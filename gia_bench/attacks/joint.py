"""Several rounds of one client as one: what error feedback holds back in a round, it sends in a later one.

With error feedback the sum of what was sent is the sum of the client's updates but for its last residual, so that a
defense which withholds much of every round withholds little of many. All is divided by the number of rounds, so that
it is as large as one round's update and labels are read off it as off one. For clients that train on the same examples
in every round (fl.local.batch_size=null, or FedAvg on all their data); rounds in which another number of examples was
used are left out. (gia_bench's own.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.replay import LocalSteps, Replay
from gia_bench.attacks.scene import Candidate, Scene
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Observation, Update


@final
@dataclass(frozen=True, kw_only=True)
class AllRounds(Replay):
    """The mean over rounds of what the guessed images would have sent, each at the model of its round. ``one``: a
    single round's replay. It costs as many gradients as there are rounds."""

    one: Replay = field(default_factory=LocalSteps)

    def copies(self, observation: Observation) -> int:
        return self.one.copies(observation)

    def arrange(self, labels: Tensor, observation: Observation, seed: int, restarts: int) -> Tensor:
        return self.one.arrange(labels, observation, seed, restarts)

    def update(self, batch: Batch, scene: Scene) -> Update:
        total = self.one.update(batch, scene)
        for past in scene.observation.earlier:
            # statistics that are written may not belong to one candidate alone: those of now, which training ignores
            own = scene.observation.buffers if scene.victim.training else past.buffers
            sent = self.one.update(batch, Scene(scene.victim, dataclasses.replace(past, buffers=own)))
            total = {k: u + sent[k] for k, u in total.items()}
        return {k: u / (1 + len(scene.observation.earlier)) for k, u in total.items()}

    def penalty(self, candidate: Candidate, scene: Scene) -> Tensor:
        return self.one.penalty(candidate, scene)

    def merge(self, pixels: Tensor, labels: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        return self.one.merge(pixels, labels, observation)


def joined(observation: Observation, victim: Victim) -> Observation:
    """One observation whose update is the mean over its own round and the earlier ones of as many examples, to be
    replayed by ``AllRounds``.

    An attacker who knows the defense, and that it ``repays`` what it withholds, compares only where the last round sent
    something: there nothing is owed, and the mean is that of the updates, exactly, if he saw all of the client's
    rounds. Where he did not he compares all entries. Of any other defense no use is made: what stands for one
    round's pruning does not stand for the mean of many.
    """
    like, alike = next(iter(observation.params.values())), _alike(observation)
    published = {k: v.to(like.device) for k, v in victim.initial()[1].items()}
    update = {k: (u + sum(e.update[k] for e in alike)) / (1 + len(alike)) for k, u in observation.update.items()}
    defense = observation.defense if exact(observation) else None
    if defense is not None:
        # the entries that the stand-in lets pass, which may be 0 in the last round and not in the mean
        ones = {k: torch.ones_like(u) for k, u in update.items()}
        passed = defense.surrogate(ones, observation)
        update = {k: torch.where(passed[k] != 0, u, 0) for k, u in update.items()}
    models = [dataclasses.replace(e, update={}, buffers={**published, **e.buffers}, defense=None) for e in alike]
    return dataclasses.replace(observation, update=update, earlier=tuple(models), defense=defense)


def exact(observation: Observation) -> bool:
    """Whether the mean over rounds is that of the updates themselves where the last round sent something: the defense
    is known and repays what it withholds, and no round of the client is missing."""
    defense = observation.defense
    # a mean of several clients owes something wherever one of them sent nothing
    own = defense is not None and defense.repays and observation.num_clients == 1
    return own and not observation.unseen and len(_alike(observation)) == len(observation.earlier)


def _alike(observation: Observation) -> list[Observation]:
    return [e for e in observation.earlier if e.num_examples == observation.num_examples]
