"""The clients' side of a round: from the broadcast to protected updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, final

import torch
from torch import Tensor

from gia_bench.data.cohort import Cohort
from gia_bench.defenses.base import Client, Defense
from gia_bench.federated.execution import ClientInputs, ClientOutputs, ClientWork
from gia_bench.federated.local import UNDEFENDED
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalResult
from gia_bench.seeding import stream
from gia_bench.values import Params, Shared, State, Update

Own: TypeAlias = Callable[[int], Params]
"""(position in the cohort) -> what this client alone is sent."""


@final
class Clients:
    """The members of a cohort in one round. Everything random is drawn here, outside ``vmap``.

    own: what each member is sent, where a malicious server does not send all the same; the executor then takes them one
    after another. asked: whether a member was asked for its update before the round, to lead it.
    """

    def __init__(
        self, rules: Rules, server: Server, states: Mapping[int, State], cohort: Cohort, own: Own | None = None
    ) -> None:
        self.rules, self.server, self.states, self.cohort, self.own = rules, server, states, cohort, own
        self.asked = False

    def announce(self) -> Shared:
        """What the defense tells all of them before they protect."""
        cohort, server = self.cohort, self.server
        generator = stream(self.rules.seed, "announce", cohort.round_index)
        return self.rules.defense.announce(
            server.params, server.defense, cohort.round_index, len(cohort.clients), generator, self.ask
        )

    def ask(self, member: int) -> tuple[Update, State]:
        """One member's update before protection, computed alone."""
        self.asked = True

        def unprotected(inputs: ClientInputs, counts: Sequence[int] | None) -> ClientOutputs:
            _, result = self._work(inputs, counts, self.rules.defense, {}, self._sent([member]))
            return ClientOutputs(result.update, result.buffers, inputs.state, result.loss)

        outputs = self._map(unprotected, [member])
        return {k: v[0] for k, v in outputs.sent.items()}, {k: v[0] for k, v in outputs.state.items()}

    def unprotected(self, member: int) -> Update:
        """One member's update by plain gradients on its own examples, computed alone, and ``buffer <name>``: to find
        where a number that is not finite came from."""
        rules, params = self.rules, self._sent([member])

        def plain(inputs: ClientInputs, counts: Sequence[int] | None) -> ClientOutputs:
            local = rules.local.at(self.cohort.round_index)
            result = local.run(rules.victim, UNDEFENDED, params, inputs.buffers, inputs.batch, {}, counts)
            named = {f"buffer {k}": v for k, v in result.buffers.items()}
            return ClientOutputs(result.update | named, result.buffers, inputs.state, result.loss)

        return {k: v[0] for k, v in self._map(plain, [member]).sent.items()}

    def run(self, chunk: Sequence[int], shared: Shared) -> ClientOutputs:
        """A chunk's protected updates [k, ...]."""
        params = self._sent(chunk)

        def protected(inputs: ClientInputs, counts: Sequence[int] | None) -> ClientOutputs:
            # one for each client: what it sees of a client's gradients is nobody else's
            informed = self.rules.defense.informed(shared)
            client, (update, buffers, loss) = self._work(inputs, counts, informed, shared, params)
            client = client._replace(seen=informed.seen())
            sent, state = self.rules.defense.protect(update, client, inputs.state, shared, inputs.noise)
            return ClientOutputs(sent, buffers, state, loss)

        return self._map(protected, chunk)

    def _work(
        self, inputs: ClientInputs, counts: Sequence[int] | None, gradients: Defense, shared: Shared, params: Params
    ) -> tuple[Client, LocalResult]:
        """What one client that is sent ``params`` starts from and trains on, and what its local work with these
        gradients gives."""
        rules = self.rules
        batch = rules.defense.transform(inputs.batch, inputs.noise)
        local = rules.local.at(self.cohort.round_index)
        told = Client(rules.victim, params, inputs.buffers, batch, learning_rate=local.learning_rate)
        client = told._replace(params=rules.defense.start(told, inputs.state, shared))
        result = local.run(rules.victim, gradients, client.params, inputs.buffers, batch, inputs.noise, counts)
        return client, result

    def _sent(self, chunk: Sequence[int]) -> Params:
        if self.own is None:
            return self.server.params
        [member] = chunk
        return self.own(member)

    def _map(self, work: ClientWork, chunk: Sequence[int]) -> ClientOutputs:
        cohort, params, defense, seed = self.cohort, self.server.params, self.rules.defense, self.rules.seed
        batch = cohort.batch(chunk)
        device = batch.inputs.device
        states, noises = [], []
        for row, member in enumerate(chunk):
            client = cohort.clients[member]
            states.append(self.states[client] if client in self.states else defense.init_client(params))
            generator = stream(seed, "noise", cohort.round_index, client)
            noises.append(defense.draw(params, type(batch)(*(t[row] for t in batch)), generator))
        inputs = ClientInputs(
            batch,
            {k: v.expand(len(chunk), *v.shape) for k, v in self.server.buffers.items()},
            _stacked(states, device),
            _stacked(noises, device),
        )
        return self.rules.executor.run(work, inputs, cohort, chunk)


def _stacked(each: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Each client's tensors [...] as [k, ...]; of one client without a copy."""
    if len(each) == 1:
        return {name: t.to(device)[None] for name, t in each[0].items()}
    return {name: torch.stack([tensors[name].to(device) for tensors in each]) for name in each[0]}
