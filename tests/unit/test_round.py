"""Laws of a federated round."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.client_dp import ClientDP
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import ConfigError, NonFiniteError
from gia_bench.federated.clients import Clients
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.steps import decay
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Noise, Params, Shared, State, Update

SIZES = (12, 7, 10, 12, 9)


def victim(*, batch_norm: bool = False) -> Victim:
    with seeded(0, "test model"):
        middle = [nn.BatchNorm2d(4)] if batch_norm else []
        module = nn.Sequential(nn.Conv2d(1, 4, 3), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    return Victim(module=module, input_shape=(1, 8, 8), num_classes=3)


def cohort(local: LocalWork, sizes: tuple[int, ...] = SIZES, round_index: int = 0) -> Cohort:
    generator = stream(0, "test images")
    total = sum(sizes)
    source = InMemory(torch.rand(total, 1, 8, 8, generator=generator), torch.randint(3, (total,), generator=generator))
    owned = torch.arange(total).split(list(sizes))
    chosen = [local.schedule(n, 0, round_index, c) for c, n in enumerate(sizes)]
    return Cohort(
        round_index=round_index,
        clients=tuple(range(len(sizes))),
        steps=tuple(tuple(own[p] for p in steps) for own, steps in zip(owned, chosen, strict=True)),
        weights=tuple(local.weight(n, s) for n, s in zip(sizes, chosen, strict=True)),
        source=_Double(source),
    )


@dataclasses.dataclass(frozen=True)
class _Double:
    """The same images in float64, so that equality is a matter of mathematics and not of rounding."""

    source: InMemory

    @property
    def labels(self) -> torch.Tensor:
        return self.source.labels

    groups = None

    def __len__(self) -> int:
        return len(self.source)

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        return self.source.images(indices).double()


def play(
    model: Victim,
    local: LocalWork,
    executor: Executor,
    *,
    defense: Defense | None = None,
    weighting: str = "examples",
    on_nonfinite: str = "fail",
    sizes: tuple[int, ...] = SIZES,
    observed: tuple[int, ...] = (1,),
) -> Round:
    rules = Rules(
        victim=model, defense=defense or NoDefense(), local=local, executor=executor, seed=3, weighting=weighting,
        on_nonfinite=on_nonfinite,
    )  # fmt: skip
    return play_round(rules, Server(*model.initial(), {}), {}, cohort(local, sizes), observed=observed)


LOCALS = {
    "fedsgd": FedSGD(batch_size=4),
    "fedsgd_all_data": FedSGD(batch_size=None),
    "fedavg_ragged": FedAvg(epochs=2, batch_size=5, momentum=0.9, weight_decay=0.01),
    "fedavg_steps": FedAvg(epochs=None, steps=3, batch_size=4),
}


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", LOCALS)
def test_loop_and_vmap_with_any_chunk_size_give_equal_rounds(name: str, batch_norm: bool) -> None:
    model = victim(batch_norm=batch_norm)
    expected = play(model, LOCALS[name], Loop())
    for chunk_size in (1, 2, 3, 16):
        got = play(model, LOCALS[name], Vmap(chunk_size=chunk_size))
        torch.testing.assert_close(got.aggregate, expected.aggregate)
        torch.testing.assert_close(got.buffers, expected.buffers)
        assert got.loss == pytest.approx(expected.loss)
        assert got.transcript is not None and expected.transcript is not None
        torch.testing.assert_close(dict(got.transcript.updates), dict(expected.transcript.updates))


def test_a_fedsgd_round_is_the_gradient_of_the_pooled_loss() -> None:
    model, local = victim(), FedSGD(batch_size=4)
    played = cohort(local)
    pooled = torch.cat([steps[0] for steps in played.steps])
    logits = model.module(played.source.images(pooled))
    loss = nn.functional.cross_entropy(logits, played.source.labels[pooled])
    expected = torch.autograd.grad(loss, list(model.module.parameters()))
    got = play(model, local, Vmap())
    torch.testing.assert_close(list(got.aggregate.values()), list(expected))
    assert got.loss == pytest.approx(loss.item())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_fedavg_round_equals_torch_sgd_in_every_client(batch_norm: bool) -> None:
    local = FedAvg(learning_rate=0.3, epochs=2, batch_size=5, momentum=0.9, weight_decay=0.01)
    model = victim(batch_norm=batch_norm)
    params, buffers = model.initial()
    played = cohort(local)
    total: dict[str, torch.Tensor] = {k: torch.zeros_like(v) for k, v in params.items()}
    means = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in buffers.items()}
    for steps, count in zip(played.steps, played.weights, strict=True):
        module = victim(batch_norm=batch_norm).module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
        for step in steps:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(played.source.images(step)), played.source.labels[step]).backward()
            optimizer.step()
        for k, p in module.named_parameters():
            total[k] += count * (params[k] - p.detach()) / sum(played.weights)
        for k, b in module.named_buffers():
            means[k] += count * b / sum(played.weights)
    got = play(model, local, Vmap())
    torch.testing.assert_close(got.aggregate, total)
    # the counter of batches is a whole number, so its mean is rounded
    rounded = {k: m if buffers[k].is_floating_point() else m.round() for k, m in means.items()}
    torch.testing.assert_close(got.buffers, rounded, check_dtype=False)


def test_the_aggregate_is_a_mean_and_not_a_moving_average() -> None:
    model, local = victim(), FedSGD(batch_size=None)
    alone = play(model, local, Loop(), sizes=(8,), observed=(0,))
    weights = {w: play(model, local, Loop(), weighting=w) for w in ("examples", "uniform")}
    assert alone.transcript is not None
    torch.testing.assert_close(alone.aggregate, dict(alone.transcript.updates[0]))
    everyone = play(model, local, Loop(), observed=(0, 1, 2, 3, 4)).transcript
    assert everyone is not None
    for name, counts in (("examples", SIZES), ("uniform", (1,) * 5)):
        mean = {
            k: sum(n * everyone.updates[c][k] for c, n in enumerate(counts)) / sum(counts) for k in everyone.aggregate
        }
        torch.testing.assert_close(weights[name].aggregate, mean)


@dataclasses.dataclass(frozen=True)
class _Noisy(Defense):
    """Adds its noise and remembers what it added."""

    def init_client(self, like: Params) -> State:
        return {k: torch.zeros_like(v) for k, v in like.items()}

    def draw(self, like: Params, batch: object, generator: torch.Generator) -> Noise:
        return {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in like.items()}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        return {k: v + noise[k] for k, v in update.items()}, {k: state[k] + noise[k] for k in update}


def test_noise_and_states_do_not_depend_on_how_clients_are_batched() -> None:
    model, local = victim(), FedSGD(batch_size=4)
    loop = play(model, local, Loop(), defense=_Noisy())
    mapped = play(model, local, Vmap(chunk_size=3), defense=_Noisy())
    torch.testing.assert_close(mapped.aggregate, loop.aggregate)
    assert sorted(loop.states) == sorted(mapped.states) == list(range(len(SIZES)))
    for client, state in loop.states.items():
        for name, value in state.items():
            assert torch.equal(value, mapped.states[client][name])
    first, second = loop.states[0], loop.states[1]
    assert not torch.equal(first["0.weight"], second["0.weight"])


@dataclasses.dataclass(frozen=True)
class _Broken(Defense):
    """Sends NaN, or another value, for the client whose batch has the smallest mean, here client 2 alone."""

    threshold: float
    value: float = torch.nan

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        bad = client.batch.inputs.mean() < self.threshold
        return {k: torch.where(bad, self.value, v) for k, v in update.items()}, state


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_update_names_client_and_round_or_drops_the_client(value: float) -> None:
    model, local = victim(), FedSGD(batch_size=4)
    means = [float(cohort(local).batch([m]).inputs.mean()) for m in range(len(SIZES))]
    culprit = means.index(min(means))
    defense = _Broken(sorted(means)[0] + 1e-9, value)
    with pytest.raises(NonFiniteError, match=rf"Client {culprit} sent NaN or infinity in round 0 \(in 0\.weight"):
        play(model, local, Vmap(chunk_size=2), defense=defense)
    dropped = play(model, local, Vmap(chunk_size=2), defense=defense, on_nonfinite="drop_client")
    assert dropped.dropped == (culprit,)
    everyone = play(model, local, Loop(), observed=tuple(range(5))).transcript
    assert everyone is not None
    rest = [c for c in range(5) if c != culprit]
    mean = {k: sum(everyone.updates[c][k] for c in rest) / len(rest) for k in everyone.aggregate}
    torch.testing.assert_close(dropped.aggregate, mean)
    with pytest.raises(NonFiniteError, match="no client sent a finite update"):
        play(model, local, Loop(), defense=_Broken(1e9), on_nonfinite="drop_client")


@dataclasses.dataclass(frozen=True)
class _Secret(Defense):
    """Sends what is right, and keeps NaN for every client."""

    def init_client(self, like: Params) -> State:
        return {"rate": torch.zeros(2, dtype=torch.float64), "count": torch.zeros(1, dtype=torch.int64)}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        return update, state | {"rate": state["rate"] + torch.nan}


def test_nan_in_what_a_defense_keeps_is_found_though_the_update_hides_it() -> None:
    with pytest.raises(NonFiniteError, match=r"Client 0 keeps NaN or infinity in round 0 \(in state rate\)"):
        play(victim(), FedSGD(batch_size=4), Vmap(chunk_size=2), defense=_Secret())


class _Root(nn.Module):
    """Adds 0 times the root of a parameter that is 0: of all gradients only its own is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0 * self.square.sqrt()


@pytest.mark.parametrize("defense", [ClipUpdate(max_norm=1.0), DPSGD(), Chain(stages={"dp": ClientDP()})])
@pytest.mark.parametrize("executor", [Loop(), Vmap(chunk_size=2)])
def test_where_a_defense_spreads_a_nan_the_tensor_of_the_clients_own_update_is_named(
    defense: Defense, executor: Executor
) -> None:
    """One norm over all tensors makes all of them NaN, and DP-SGD does so within its gradient."""
    model, local = victim(), FedSGD(batch_size=4)
    model = dataclasses.replace(model, module=nn.Sequential(*model.module, _Root()))
    with pytest.raises(NonFiniteError, match=r"round 0 \(in 4.square\)\. Lower"):
        play(model, local, executor)
    told = r"\(in 0\.weight.*\)\. Before protection its update by plain gradients was not finite in 4\.square\. Lower"
    with pytest.raises(NonFiniteError, match=told):
        play(model, local, executor, defense=defense)


def test_where_a_defense_makes_a_nan_of_a_finite_update_it_is_blamed() -> None:
    with pytest.raises(NonFiniteError, match=r"by plain gradients was finite: the defense made it so\."):
        play(victim(), FedSGD(batch_size=4), Vmap(chunk_size=2), defense=_Broken(1e9))


def test_the_update_before_protection_is_only_computed_to_explain_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Update:
        raise AssertionError("computed")

    monkeypatch.setattr(Clients, "unprotected", never)
    play(victim(), FedSGD(batch_size=4), Loop(), defense=ClipUpdate())
    broken = _Broken(0.5)
    assert play(victim(), FedSGD(batch_size=4), Loop(), defense=broken, on_nonfinite="drop_client").dropped


def test_buffers_that_are_not_finite_count_as_the_update() -> None:
    model, local = victim(batch_norm=True), FedSGD(batch_size=4)
    params, buffers = model.initial()
    spoilt = {k: torch.full_like(v, torch.nan) if "var" in k else v for k, v in buffers.items()}
    rules = Rules(victim=model, defense=NoDefense(), local=local, executor=Loop(), seed=3)
    with pytest.raises(NonFiniteError, match=r"buffer \S*running_var"):
        play_round(rules, Server(params, spoilt, {}), {}, cohort(local))


def test_an_error_in_the_loop_names_the_client() -> None:
    model = dataclasses.replace(victim(), num_classes=3)
    broken = cohort(FedSGD(batch_size=4))
    broken.source.labels[broken.steps[3][0]] = 99
    rules = Rules(victim=model, defense=NoDefense(), local=FedSGD(batch_size=4), executor=Loop(), seed=0)
    with pytest.raises(RuntimeError) as caught:
        play_round(rules, Server(*model.initial(), {}), {}, broken)
    assert "client 3 in round 0" in "".join(caught.value.__notes__)


def test_a_round_mutates_nothing_and_keeps_only_observed_clients() -> None:
    model, local = victim(batch_norm=True), FedAvg(epochs=1, batch_size=4)
    params, buffers = model.initial()
    before = {k: v.clone() for k, v in (params | buffers).items()}
    rules = Rules(victim=model, defense=NoDefense(), local=local, executor=Vmap(), seed=0)
    played = play_round(rules, Server(params, buffers, {}), {}, cohort(local), observed=(2, 4))
    assert played.transcript is not None
    assert set(played.transcript.updates) == set(played.transcript.payloads) == {2, 4}
    for name, value in (params | buffers).items():
        assert torch.equal(value, before[name])
    assert play_round(rules, Server(params, buffers, {}), {}, cohort(local)).transcript is None


def test_fedsgd_walks_through_all_of_a_clients_data_before_it_repeats() -> None:
    local = FedSGD(batch_size=3)
    seen = torch.cat([local.schedule(12, 0, r, 5)[0] for r in range(4)])
    assert sorted(seen.tolist()) == list(range(12))
    again = torch.cat([local.schedule(12, 0, r, 5)[0] for r in range(4, 8)])
    assert sorted(again.tolist()) == list(range(12)) and not torch.equal(seen, again)


def test_the_truth_of_a_client_holds_each_of_its_images_once() -> None:
    local = FedAvg(epochs=3, batch_size=5)
    played = cohort(local)
    truth = played.truth((1,))
    assert len(truth.labels) == SIZES[1]
    used = torch.cat(played.steps[1]).unique()
    torch.testing.assert_close(
        truth.inputs.flatten(1).sum(1).sort().values, played.source.images(used).flatten(1).sum(1).sort().values
    )
    assert len(played.truth(played.clients).labels) == sum(SIZES)


def test_an_update_of_a_few_local_steps_stands_for_the_images_it_used() -> None:
    local = FedAvg(epochs=None, steps=1, batch_size=4)
    played = cohort(local)
    assert played.weights == SIZES
    assert played.num_examples == (4,) * len(SIZES)
    assert len(played.truth((2,)).labels) == 4
    transcript = play(victim(), local, Vmap()).transcript
    assert transcript is not None
    assert transcript.payloads[1].num_examples == 4
    assert transcript.num_examples == 4 * len(SIZES)


def test_a_dropped_client_is_not_behind_the_sum() -> None:
    model, local = victim(), FedSGD(batch_size=4)
    means = [float(cohort(local).batch([m]).inputs.mean()) for m in range(len(SIZES))]
    played = play(model, local, Loop(), defense=_Broken(sorted(means)[0] + 1e-9), on_nonfinite="drop_client")
    assert played.transcript is not None
    assert set(played.transcript.clients) == set(range(len(SIZES))) - set(played.dropped)
    assert played.transcript.num_examples == 4 * (len(SIZES) - 1)


def test_the_attacker_is_told_the_learning_rate_of_the_round() -> None:
    local = FedAvg(learning_rate=0.5, milestones=(3,), gamma=0.1)
    assert local.at(2).learning_rate == 0.5
    assert local.at(3).learning_rate == pytest.approx(0.05)
    assert local.at(3).at(3) == local.at(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedSGD(batch_size=0), "batch_size=0"),
        (lambda: FedAvg(epochs=1, steps=2), "exactly one of epochs and steps"),
        (lambda: FedAvg(learning_rate=0.0), "positive learning rate"),
        (lambda: FedAvg(milestones=[1, 2], gamma=[0.1]), "one per milestone"),
        (lambda: FedSGD(batch_size=9).schedule(5, 0, 0, 7), "client 7 holds only 5 examples"),
        (lambda: Vmap(chunk_size=0), "chunk_size=0"),
    ],
)
def test_settings_out_of_range_are_refused_with_a_sentence(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_decay_multiplies_every_milestone_that_has_passed() -> None:
    assert [decay((2, 4), 0.1, r) for r in (1, 2, 5)] == pytest.approx([1, 0.1, 0.01])
    assert decay((2, 4), (0.5, 0.2), 4) == pytest.approx(0.1)
