"""GradDefense in whole rounds: clipping, loop and vmap, chains, and the attackers who know it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.attacks.compensating import Compensating
from gia_bench.attacks.distances import Cosine, Euclidean
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.compensation import RandomMatrix
from gia_bench.defenses.graddefense import GradDefense
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.defenses.sensitivity import LayerSize, Sensitivity
from gia_bench.defenses.slices import energies
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Reconstruction, Update

ANY: Any = None  # what these calls do not look at
SIZES = LayerSize()
EXACT = RandomMatrix(variance="exact")


def net(norm: nn.Module | None = None) -> Victim:
    with seeded(0, "model"):
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), *([norm] if norm else []), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
        )
    return Victim(module=network, input_shape=(1, 6, 6), num_classes=3)


def source(count: int, name: str) -> InMemory:
    g = stream(0, name)
    return InMemory(torch.rand(count, 1, 6, 6, generator=g), torch.randint(3, (count,), generator=g))


def play(defense: Defense, executor: Executor, local: LocalWork, sizes: tuple[int, ...] = (5, 3, 4)) -> Round:
    owned = torch.arange(sum(sizes)).split(list(sizes))
    chosen = [local.schedule(n, 0, 0, c) for c, n in enumerate(sizes)]
    cohort = Cohort(
        round_index=0,
        clients=tuple(range(len(sizes))),
        steps=tuple(tuple(own[s] for s in steps) for own, steps in zip(owned, chosen, strict=True)),
        weights=sizes,
        source=source(sum(sizes), "images"),
    )
    victim = net()
    defense = defense.calibrate(victim, source(40, "public"))
    params, buffers = victim.initial()
    rules = Rules(victim=victim, defense=defense, local=local, executor=executor, seed=0)
    server = Server(params, buffers, defense.init_server(params))
    with torch.no_grad():
        return play_round(rules, server, {}, cohort, observed=cohort.clients)


SENSITIVE = Sensitivity(root_size=20)


WORK = [FedSGD(batch_size=None), FedAvg(learning_rate=0.1, batch_size=2)]


@pytest.mark.parametrize("local", WORK, ids=["sgd", "avg"])
@pytest.mark.parametrize(
    "defense",
    [
        GradDefense(risk=SENSITIVE, compensation=EXACT),
        GradDefense(risk=SENSITIVE, variance=1.0, clip=0.1),
        Chain(stages={"own": GradDefense(risk=SENSITIVE, clip=0.1), "noise": GaussianNoise(variance=1e-6)}),
    ],
    ids=["plain", "clipped", "chain"],
)
def test_a_loop_and_vmap_play_equal_rounds(defense: Defense, local: LocalWork) -> None:
    alone, together = (play(defense, executor, local) for executor in (Loop(), Vmap(chunk_size=2)))
    for k, a in alone.aggregate.items():
        assert torch.allclose(together.aggregate[k], a, rtol=1e-5, atol=1e-6)
    assert alone.transcript is not None and together.transcript is not None
    for client, update in alone.transcript.updates.items():
        assert all(torch.allclose(together.transcript.updates[client][k], u, atol=1e-6) for k, u in update.items())
        # what is sent is dense
        assert alone.transcript.payloads[client].num_bytes == sum(u.nbytes for u in update.values())


def test_each_examples_gradient_is_short_in_every_chosen_slice_and_untouched_elsewhere() -> None:
    victim, bound = net(), 0.05
    params, buffers = victim.initial()
    defense = GradDefense(risk=SIZES, clip=bound, gamma=0.4)
    shared = defense.announce(params, defense.init_server(params), 0, 1, stream(0), ANY)
    noise = defense.draw(params, ANY, stream(1))
    images = source(6, "images")
    batch = Cohort(round_index=0, clients=(0,), steps=((torch.arange(6),),), weights=(6,), source=images).batch([0])
    one_step = type(batch)(*(t[0, 0] for t in batch))

    def loss(weights: Update, some: Any, replaced: Any = None, /) -> Any:
        return victim.objective(weights, buffers, some)

    local = defense.informed(shared)
    found, after, value = local.gradient(loss, params, one_step, noise, 0)
    plain_loss = victim.objective(params, buffers, one_step)[0]
    assert value == pytest.approx(float(plain_loss), rel=1e-5) and after == {}
    borders, rows = shared["borders"].tolist(), []
    for i in range(6):
        single = type(batch)(*(t[i : i + 1] for t in one_step))
        gradient = torch.func.grad(lambda p, s=single: victim.objective(p, buffers, s)[0])(params)
        row = torch.cat([g.reshape(-1) for g in gradient.values()])
        for j, chosen in enumerate(noise["chosen"].tolist()):
            part = slice(borders[j], borders[j + 1])
            if chosen:
                assert float(row[part].norm()) > bound, "else nothing is clipped"
                row[part] /= max(1.0, float(row[part].norm()) / bound)
        rows.append(row)
        alone, _, _ = local.gradient(loss, params, single, noise, 0)
        lengths = energies(alone, shared["borders"], params).sqrt()
        assert (lengths[noise["chosen"]] <= bound * (1 + 1e-5)).all()
        assert (lengths[~noise["chosen"]] > bound).any()
    assert torch.allclose(torch.cat([f.reshape(-1) for f in found.values()]), torch.stack(rows).mean(0), atol=1e-6)


def test_the_noise_of_the_clipped_form_is_the_variance_times_the_bound_squared() -> None:
    assert GradDefense(variance=4.0, clip=0.1).sigma == pytest.approx(0.2)
    assert GradDefense(variance=4.0).sigma == 2
    assert GradDefense(clip=None).informed({}) == GradDefense(clip=None)


def test_what_does_not_go_together_is_refused_with_the_way_out() -> None:
    with pytest.raises(IncompatibleError, match=r"BatchNorm in training mode.*training=false.*defense\.clip=null"):
        GradDefense(clip=0.1).check_victim(net(nn.BatchNorm2d(4)))
    GradDefense().check_victim(net(nn.BatchNorm2d(4)))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: GradDefense(variance=-1), "variance=-1 must be finite and at least 0"),
        (lambda: GradDefense(gamma=1.5), r"gamma=1.5 must lie in \[0, 1\]"),
        (lambda: GradDefense(slices=0), "slices=0 must be a whole number"),
        (lambda: GradDefense(clip=0), "clip=0 must be finite and above 0, or null"),
        (lambda: Sensitivity(root_size=0), "root_size=0 must be a whole number"),
        (lambda: Sensitivity(class_bias=1.5), r"class_bias=1.5 must lie in \[0, 1\], or be null"),
        (lambda: Sensitivity(directions="all"), "directions='all' is not known. Choose one of: ones, random"),
        (lambda: RandomMatrix(q=0.5), "q=0.5 must be finite and at least 1"),
        (lambda: RandomMatrix(scope="tensor"), "scope='tensor' is not known. Choose one of: global, layer"),
        (lambda: RandomMatrix(variance="own"), "variance='own' is not known. Choose one of: exact, paper"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_a_sentence(made: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made()


def observation(defense: GradDefense, seed: int = 1) -> tuple[Observation, Update, Tensor]:
    """What is seen of a small update, the update itself, and the chosen slices."""
    params = net().initial()[0]
    update = {k: 0.01 * torch.randn(p.shape, generator=stream(0, k)) for k, p in params.items()}
    shared = defense.announce(params, defense.init_server(params), 0, 5, stream(0), ANY)
    noise = defense.draw(params, ANY, stream(seed))
    sent, _ = defense.protect(update, Client(ANY, params, {}, ANY), {}, shared, noise)
    seen = Observation(params=params, update=sent, shared=shared, defense=defense, num_examples=1)
    return seen, update, noise["chosen"]


def test_who_knows_the_defense_leaves_out_the_slices_with_noise_and_finds_the_update_there() -> None:
    defense = GradDefense(risk=SIZES, gamma=0.3)
    seen, update, chosen = observation(defense)
    stand_in = defense.surrogate(update, seen)
    kept = energies(stand_in, seen.shared["borders"], seen.params) > 0
    assert torch.equal(kept, ~chosen)
    # the true update is nearer than any other: the noise is a constant in the one and a factor in the other distance
    wrong = {k: u + 0.003 * torch.randn(u.shape, generator=stream(9, k)) for k, u in update.items()}
    for distance in (Euclidean(), Cosine()):
        assert distance(stand_in, seen.update) < distance(defense.surrogate(wrong, seen), seen.update)
    hidden = dataclasses.replace(seen, shared={})
    assert defense.surrogate(update, hidden) is update


@dataclasses.dataclass(frozen=True)
class Spy(Attack):
    """Keeps what it is shown."""

    seen: list[Observation] = dataclasses.field(default_factory=list)

    @property
    def requires(self) -> Knowledge:
        return Knowledge.LABELS

    @property
    def max_examples(self) -> int | None:
        return 1

    def reconstruct_many(
        self, observations: Any, victim: Victim, *, seeds: Any, snapshots: Snapshots = FORGET
    ) -> list[Reconstruction]:
        self.seen.extend(observations)
        return [Reconstruction(inputs=torch.zeros(1, 1, 6, 6), labels=None, score=0.0) for _ in observations]


def test_an_attacker_who_compensates_attacks_the_compensated_update_of_one_client() -> None:
    spy = Spy()
    attack = Compensating(attack=spy)
    assert attack.requires == Knowledge.LABELS | Knowledge.DEFENSE | Knowledge.SHARED
    assert attack.max_examples == 1
    defense = GradDefense(risk=SIZES, compensation=EXACT, variance=1e-2)
    seen, _, _ = observation(defense)
    attack.reconstruct(seen, net())
    [shown] = spy.seen
    expected = EXACT.denoise(seen.update, 0.2 * 1e-2, [1.0])  # m = 1, though five clients played
    assert all(torch.equal(shown.update[k], e) for k, e in expected.items())
    assert any(not torch.equal(shown.update[k], seen.update[k]) for k in expected)
    assert shown.defense is None and shown.shared == {}
    chained = Chain(stages={"own": defense, "noise": GaussianNoise(variance=1e-9)})
    inside = dataclasses.replace(seen, defense=chained, shared={f"0.{k}": v for k, v in seen.shared.items()})
    attack.reconstruct(inside, net())
    assert all(torch.equal(spy.seen[1].update[k], e) for k, e in expected.items())
    # a joint attack inside sees the earlier rounds compensated too
    attack.reconstruct(dataclasses.replace(seen, earlier=(inside, seen)), net())
    for past in spy.seen[2].earlier:
        assert all(torch.equal(past.update[k], e) for k, e in expected.items())
        assert past.defense is None and past.shared == {}
    with pytest.raises(IncompatibleError, match="must know the defense; take threat=adaptive_labels"):
        attack.reconstruct(dataclasses.replace(seen, defense=None), net())


def test_the_servers_compensation_brings_the_mean_nearer_and_the_papers_variance_leaves_it() -> None:
    params = {"w": torch.zeros(468, 78), "b": torch.zeros(10)}
    g, m = stream(0), 10
    row = torch.randn(468, 1, generator=g) @ torch.randn(1, 78, generator=g)
    true = {"w": row * 0.02, "b": torch.zeros(10)}
    distances = {}
    for name in ("paper", "exact"):
        defense = GradDefense(risk=SIZES, compensation=RandomMatrix(scope="layer", variance=name))
        shared = defense.announce(params, defense.init_server(params), 0, m, stream(0), ANY)
        client = Client(ANY, params, {}, ANY)
        sent = [defense.protect(true, client, {}, shared, defense.draw(params, ANY, stream(c)))[0] for c in range(m)]
        mean = {k: torch.stack([s[k] for s in sent]).mean(0) for k in true}
        after, state = defense.compensate(mean, {}, shared, [1 / m] * m)
        distances[name] = float((after["w"] - true["w"]).norm() / (mean["w"] - true["w"]).norm())
        assert set(state) == {"risk"}
    assert distances["exact"] < 0.7 < distances["paper"]
