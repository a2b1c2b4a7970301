from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from gia_bench.conf_path import CONF
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.ats import ATS
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.client_dp import ClientDP
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.graddefense import GradDefense
from gia_bench.defenses.mixup import MixUp
from gia_bench.defenses.noise import GaussianNoise, LaplaceNoise
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.outpost import Outpost
from gia_bench.defenses.precision import HalfPrecision, Int8
from gia_bench.defenses.quantize import QSGD, SignSGD
from gia_bench.defenses.sensitivity import LayerSize
from gia_bench.defenses.soteria import Soteria
from gia_bench.defenses.sparsify import GradientCompression, RandomK, Threshold
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.execution import Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.models.functional import Victim
from gia_bench.pruning.pruned import Pruned
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Noise, Observation, Shared, State, Update

ANY: Any = None  # the client and batch, which these defenses do not look at
UPDATE = {"w": torch.randn(30, 20, generator=stream(0, "w")), "b": torch.randn(20, generator=stream(0, "b"))}
OFF = ErrorFeedback(enabled=False)
NOISE = GaussianNoise(variance=1e-2)  # as in its YAML


@final
@dataclass(frozen=True, kw_only=True)
class Affine(Defense):
    """Multiplies and adds, on the client, on the server and on the images: orders can be told apart."""

    times: float
    plus: float

    def transform(self, batch: Batch, noise: Noise) -> Batch:
        return batch._replace(inputs=self.times * batch.inputs + self.plus)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return nn.Sequential(model, nn.Linear(int(self.times), 1))

    def init_server(self, like: Update) -> State:
        return {"calls": torch.zeros(())}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        return {k: self.times * u + self.plus for k, u in update.items()}, state

    def compensate(
        self, aggregate: Update, server_state: State, shared: Shared, shares: Sequence[float]
    ) -> tuple[Update, State]:
        undone = {k: (u - self.plus) / self.times for k, u in aggregate.items()}
        return undone, {"calls": server_state["calls"] + self.times}

    def surrogate(self, update: Update, observation: Observation) -> Update:
        return {k: self.times * u + self.plus for k, u in update.items()}


def chain(*stages: Defense) -> Chain:
    return Chain(stages={f"stage{i}": s for i, s in enumerate(stages)})


def protected(defense: Defense, state: State | None = None) -> tuple[Update, State]:
    state = defense.init_client(UPDATE) if state is None else state
    return defense.protect(UPDATE, ANY, state, {}, defense.draw(UPDATE, ANY, stream(0, "noise")))


@pytest.mark.parametrize(
    "defense", [NoDefense(), GaussianNoise(scale=1.0), DGP(), QSGD(), RandomK(), ClipUpdate(max_norm=0.5)], ids=repr
)
def test_a_chain_of_one_is_that_one(defense: Defense) -> None:
    alone, state = protected(defense)
    together, chained = protected(chain(defense))
    assert all(torch.equal(alone[k], u) for k, u in together.items())
    assert list(chained) == [f"0.{k}" for k in state]
    assert chain(defense).measure(chained).keys() == defense.measure(state).keys()
    size = defense.codec.encode(alone, {}, 1).num_bytes
    assert chain(defense).codec.encode(together, {}, 1).num_bytes == size


def test_clients_go_forward_and_the_server_backward() -> None:
    both = chain(Affine(times=2, plus=1), Affine(times=3, plus=5))
    sent, _ = protected(both)
    assert torch.equal(sent["w"], 3 * (2 * UPDATE["w"] + 1) + 5)
    server = both.init_server(UPDATE)
    undone, after = both.compensate(sent, server, {}, [1.0])
    assert torch.allclose(undone["w"], UPDATE["w"], atol=1e-5)
    assert {k: float(v) for k, v in after.items()} == {"0.calls": 2, "1.calls": 3}
    seen = Observation(params=UPDATE, update=sent)
    assert torch.equal(both.surrogate(UPDATE, seen)["w"], sent["w"])
    images = Batch(torch.ones(1, 1, 1, 2, 2), torch.zeros(1, 1), torch.ones(1, 1))
    assert torch.equal(both.transform(images, {}).inputs, torch.full_like(images.inputs, 3 * 3 + 5))
    model = both.prepare_model(nn.Identity())
    assert isinstance(model, nn.Sequential) and isinstance(model[0], nn.Sequential)
    assert [layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)] == [2, 3]


def test_each_stage_keeps_its_own_residual() -> None:
    both = chain(TopK(keep=0.5), DGP())
    first, state = TopK(keep=0.5).protect(UPDATE, ANY, TopK().init_client(UPDATE), {}, {})
    second, later = DGP().protect(first, ANY, DGP().init_client(UPDATE), {}, {})
    sent, together = protected(both)
    assert all(torch.equal(sent[k], u) for k, u in second.items())
    expected = {f"0.{k}": v for k, v in state.items()} | {f"1.{k}": v for k, v in later.items()}
    assert together.keys() == expected.keys() == both.init_client(UPDATE).keys()
    assert all(torch.equal(together[k], v) for k, v in expected.items())
    assert both.measure(together) == DGP().measure(later)


def test_what_a_stage_draws_does_not_depend_on_the_stages_before_it() -> None:
    noises = [
        chain(before, NoDefense(), GaussianNoise(scale=1.0)).draw(UPDATE, ANY, stream(3))
        for before in (NoDefense(), LaplaceNoise(scale=1.0), GaussianNoise(scale=2.0))
    ]
    assert all(torch.equal(n["2.w"], noises[0]["2.w"]) for n in noises)
    twice = chain(GaussianNoise(scale=1.0), GaussianNoise(scale=1.0)).draw(UPDATE, ANY, stream(3))
    assert abs(float(torch.corrcoef(torch.stack([twice["0.w"].view(-1), twice["1.w"].view(-1)]))[0, 1])) < 0.2


@pytest.mark.parametrize(
    ("stages", "num_bytes"),
    [
        ((ClipUpdate(), GaussianNoise(scale=0.1)), 4 * 620),
        (
            (TopK(error_feedback=OFF), ClipUpdate()),
            8 * 2 + 120 * 4 + 75 + 4 * 4 + 3,
        ),  # two bitmaps in one row: 620 bits
        ((GaussianNoise(scale=0.1), HalfPrecision()), 2 * 620 + 2),
        ((SignSGD(), HalfPrecision()), 2 * 620 + 2),
    ],
    ids=str,
)
def test_the_last_stage_that_packs_decides_how_it_travels_and_nothing_is_lost(
    stages: tuple[Defense, ...], num_bytes: int
) -> None:
    defense = chain(*stages)
    sent, _ = protected(defense)
    payload = defense.codec.encode(sent, {}, 1)
    decoded = defense.codec.decode(payload, UPDATE, {})
    assert all(torch.equal(decoded[k], u) for k, u in sent.items())
    assert payload.num_bytes == num_bytes


def test_an_aligned_stage_stands_first_and_its_mask_is_used_by_name() -> None:
    defense = chain(ADGP(), ClipUpdate(max_norm=1.0))
    state = defense.init_client(UPDATE)
    shared = defense.announce(UPDATE, {}, 0, 1, stream(0), lambda position: (UPDATE, state))
    assert set(shared) == {"0.mask.w", "0.mask.b"}
    sent, _ = defense.protect(UPDATE, ANY, state, shared, {})
    payload = defense.codec.encode(sent, shared, 1)
    assert payload.num_bytes == 4 * sum(int(m.sum()) for m in shared.values())
    decoded = defense.codec.decode(payload, UPDATE, shared)
    assert all(torch.equal(decoded[k], u) for k, u in sent.items())
    seen = Observation(params=UPDATE, update=sent, shared=shared)
    ones = {k: torch.ones_like(u) for k, u in UPDATE.items()}
    assert torch.equal(defense.surrogate(ones, seen)["w"] != 0, shared["0.mask.w"])


NOISY = (GradDefense(), Outpost())
"""They add noise of which an attacker is told no law."""


@pytest.mark.parametrize("noisy", [GradDefense(), DPSGD()], ids=str)
def test_the_noise_of_a_chain_has_no_law_where_an_earlier_stage_adds_another(noisy: Defense) -> None:
    later = GaussianNoise(variance=1e-4)
    assert chain(noisy, later).noise_law() is None is not chain(ClipUpdate(), later).noise_law()


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ((), "stages is empty; name at least one"),
        ((ClipUpdate(), ADGP()), "stage1 announces .* the order is stage0, stage1; put it first"),
        ((ADGP(), ADGP()), "stage1 announces"),
        ((DPSGD(), NoDefense(), DPSGD()), "stage0 and stage2 both compute the gradient"),
        ((ADGP(), GaussianNoise(scale=0.1)), "stage1 comes after stage0, and would fill what it empties"),
        ((ADGP(), ClipUpdate(), LaplaceNoise(scale=0.1)), "stage2 comes after stage0"),
        ((TopK(), GaussianNoise(scale=0.1)), "put what packs last, but the order is stage0, stage1"),
        ((HalfPrecision(), ClientDP()), "put what packs last"),
        ((GaussianNoise(scale=0.1), TopK(), ClipUpdate()), "stage2 comes after stage0, and would clip the noise"),
        ((ClientDP(), ClientDP()), "would clip the noise"),
        *(((noisy, late), "would clip the noise") for noisy in NOISY for late in (ClipUpdate(), ClientDP())),
        ((MixUp(), ATS()), "stage1 comes after stage0, and would transform a mixture"),
        ((Outpost(), DPSGD()), "stage0 and stage1 both compute the gradient"),
        ((GradDefense(clip=0.1), DPSGD()), "stage0 and stage1 both compute the gradient"),
        ((Chain(stages={"clip": ClipUpdate()}), TopK()), "stage0 is a chain itself"),
    ],
    ids=str,
)
def test_an_order_that_cannot_work_is_refused_with_the_way_out(stages: tuple[Defense, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=f"defense chain: .*{says}") as refused:
        chain(*stages)
    # what cannot go together is skipped in a sweep; what is no chain at all fails
    assert isinstance(refused.value, IncompatibleError) == ("order" in str(refused.value) or "both" in says)


def test_a_stage_that_announces_without_a_leader_may_stand_anywhere() -> None:
    defense = chain(ClipUpdate(), GradDefense(risk=LayerSize(), slices=2), GaussianNoise(scale=0.1))
    shared = defense.announce(UPDATE, defense.init_server(UPDATE), 0, 3, stream(0), ANY)
    assert set(shared) == {"1.borders", "1.risk"}
    led = chain(ADGP(), ClipUpdate())
    assert led.asks_a_leader and not defense.asks_a_leader


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"first": ClipUpdate(), "second": NOISE}),
        (["defense.stages.first.max_norm=1"], {"first": ClipUpdate(max_norm=1), "second": NOISE}),
        (["defense@defense.stages.second=top_k"], {"first": ClipUpdate(), "second": TopK()}),
        (
            ["+defense@defense.stages.third=half_precision", "defense.stages.third.dtype=bfloat16"],
            {"first": ClipUpdate(), "second": NOISE, "third": HalfPrecision(dtype="bfloat16")},
        ),
        (["~defense@defense.stages.second"], {"first": ClipUpdate()}),
        (["+defense@defense.stages.third=top_k"], {"first": ClipUpdate(), "second": NOISE, "third": TopK()}),
    ],
    ids=str,
)
def test_a_chain_is_composed_on_the_command_line(overrides: list[str], expected: dict[str, Defense]) -> None:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["defense=chain", *overrides])
    made = instantiate(cfg.defense, _convert_="all")
    assert isinstance(made, Chain)
    assert list(made.stages.items()) == list(expected.items())


def a_round(defense: Defense, executor: Loop | Vmap, local: FedSGD | FedAvg) -> Round:
    """One round of five unequal clients, all seen."""
    sizes = (8, 5, 8, 3, 6)
    g, total = stream(0, "images"), sum(sizes)
    source = InMemory(torch.rand(total, 1, 8, 8, generator=g), torch.randint(3, (total,), generator=g))
    owned = torch.split(torch.arange(total), list(sizes))
    chosen = [local.schedule(n, 0, 0, c) for c, n in enumerate(sizes)]
    steps = tuple(tuple(own[s] for s in rows) for own, rows in zip(owned, chosen, strict=True))
    cohort = Cohort(round_index=0, clients=tuple(range(5)), steps=steps, weights=sizes, source=source)
    with seeded(0, "model"):
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 36, 3))
    victim = Victim(module=defense.prepare_model(network), input_shape=(1, 8, 8), num_classes=3)
    params, buffers = victim.initial()
    rules = Rules(victim=victim, defense=defense, local=local, executor=executor, seed=0)
    server = Server(params, buffers, defense.init_server(params))
    with torch.no_grad():
        return play_round(rules, server, {}, cohort, observed=range(5))


@pytest.mark.parametrize(
    "defense",
    [
        ClipUpdate(max_norm=0.1), HalfPrecision(), Int8(rounding="stochastic"), QSGD(), SignSGD(),
        GradientCompression(), RandomK(), Threshold(value=0.01), DPSGD(), Soteria(features_at_once=30),
        chain(DPSGD(), TopK()), chain(ADGP(), ClipUpdate(max_norm=0.1), DPSGD()),
        chain(ClipUpdate(max_norm=0.1), GaussianNoise(scale=0.01), TopK(), Int8()),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("local", [FedSGD(batch_size=None), FedAvg(batch_size=3)], ids=["sgd", "avg"])
def test_a_round_is_the_same_in_a_loop_and_under_vmap_in_any_chunks(defense: Defense, local: FedSGD | FedAvg) -> None:
    loop, *mapped = [a_round(defense, e, local) for e in (Loop(), Vmap(chunk_size=2), Vmap(chunk_size=16))]
    assert loop.transcript is not None
    for other in mapped:
        assert other.transcript is not None
        for client, update in loop.transcript.updates.items():
            for name, sent in update.items():
                # an entry at the edge of a rounding step, or of a selection, may fall to the other side
                close = torch.isclose(other.transcript.updates[client][name], sent, rtol=1e-3, atol=1e-5)
                assert close.float().mean() > 0.98, (client, name)
        assert other.states.keys() == loop.states.keys()
    dense = sum(p.nbytes for p in loop.aggregate.values())
    assert all(size <= dense + 8 * len(loop.aggregate) for size in loop.uplink_bytes.values())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClipUpdate(max_norm=0), "defense clip: max_norm=0 must be finite and above 0"),
        (lambda: ClipUpdate(norm=3), "defense clip: norm=3 is not known. Choose one of: 1, 2"),
        (lambda: HalfPrecision(dtype="float8"), "dtype='float8' is not known. Choose one of: bfloat16, float16"),
        (lambda: Int8(rounding="up"), "rounding='up' is not known. Choose one of: nearest, stochastic"),
        (lambda: Int8(scope="all"), "defense int8: scope='all' is not known"),
        (lambda: QSGD(levels=0), "levels=0 must be a whole number from 1 to 127"),
        (lambda: QSGD(levels=128), "levels=128 must"),
        (lambda: QSGD(levels=1.5), "levels=1.5 must"),  # type: ignore[arg-type]
        (lambda: SignSGD(scale="max"), "scale='max' is not known. Choose one of: mean_abs, none"),
        (lambda: GradientCompression(prune=1), r"prune=1 must lie in \[0, 1\)"),
        (lambda: GradientCompression(prune=80), "prune=80 must lie .* 0.8 means 80 %"),
        (lambda: RandomK(keep=0), r"keep=0 must lie in \(0, 1\]"),
        (lambda: Threshold(value=-1), "value=-1 must be finite and at least 0"),
        (lambda: DPSGD(max_grad_norm=0), "max_grad_norm=0 must be finite and above 0"),
        (lambda: DPSGD(noise_multiplier=-1), "noise_multiplier=-1 must be finite and at least 0"),
        (lambda: Soteria(prune=60), "prune=60 must lie .* 0.6 means 60 %"),
        (lambda: Soteria(epsilon=-0.1), "epsilon=-0.1 must be finite and at least 0"),
        (lambda: Soteria(features_at_once=0), "features_at_once=0 must be a whole number of at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_a_sentence(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_soteria_says_that_local_steps_are_not_what_its_paper_protects() -> None:
    said = Soteria().remark(FedAvg(learning_rate=0.1))
    assert said is not None and "one gradient" in said
    assert Soteria().remark(FedSGD()) is None
    assert [leaf.remark(FedAvg(learning_rate=0.1)) for leaf in chain(ClipUpdate(), Soteria()).leaves()] == [None, said]


@pytest.mark.parametrize("wrapper", [Chain, Pruned])
def test_what_wraps_a_defense_passes_on_all_that_it_is_asked(wrapper: type[Defense]) -> None:
    asked = {name for name in vars(Defense) if name.startswith("check_")}
    assert asked and asked <= vars(wrapper).keys()
