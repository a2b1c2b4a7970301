"""Laws of secure aggregation: masks hide every client and cancel in the sum."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from typing import Any, TypeVar

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from gia_bench.compatibility import check_aggregation
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import ConfigError, IncompatibleError, NonFiniteError, WireError
from gia_bench.federated.aggregation import Aggregation, Meeting, Plain
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg
from gia_bench.federated.ranks import Alone, Ranks
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.secure import KEYS, SEALED, SHARE, TOTAL_WEIGHT, Secure
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.pruning.pruned import Pruned
from gia_bench.pruning.random_mask import RandomMask
from gia_bench.seeding import seeded, stream
from gia_bench.threat import ThreatModel
from gia_bench.values import Noise, Shared, State, Update
from gia_bench.wire import DENSE

T = TypeVar("T")
SIZES = (6, 4, 5, 6, 3)
CLIENTS = (4, 0, 9, 2, 7)


def victim() -> Victim:
    """With BatchNorm, so that floats and whole numbers are among the buffers."""
    with seeded(0, "test model"):
        module = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 16, 3)
        ).double()
    return Victim(module=module, input_shape=(1, 6, 6), num_classes=3)


@dataclasses.dataclass(frozen=True)
class _Double:
    """The same images in float64, so that what differs is the fixed point and not the rounding of floats."""

    source: InMemory
    groups = None

    @property
    def labels(self) -> Tensor:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def images(self, indices: Tensor) -> Tensor:
        return self.source.images(indices).double()


def cohort(local: LocalWork) -> Cohort:
    generator, total = stream(0, "test images"), sum(SIZES)
    images = torch.rand(total, 1, 6, 6, generator=generator)
    source = _Double(InMemory(images, torch.randint(3, (total,), generator=generator)))
    owned = torch.arange(total).split(list(SIZES))
    chosen = [local.schedule(n, 0, 0, c) for c, n in zip(CLIENTS, SIZES, strict=True)]
    return Cohort(
        round_index=0, clients=CLIENTS, source=source,
        steps=tuple(tuple(own[p] for p in steps) for own, steps in zip(owned, chosen, strict=True)),
        weights=tuple(local.weight(n, s) for n, s in zip(SIZES, chosen, strict=True)),
    )  # fmt: skip


def play(
    aggregation: Aggregation,
    *,
    defense: Defense | None = None,
    executor: Executor | None = None,
    ranks: Ranks | None = None,
    model: Victim | None = None,
    on_nonfinite: str = "fail",
) -> Round:
    local, model = FedAvg(epochs=1, batch_size=3), model or victim()
    rules = Rules(
        victim=model, defense=defense or NoDefense(), local=local, executor=executor or Vmap(), seed=5,
        on_nonfinite=on_nonfinite, aggregation=aggregation,
    )  # fmt: skip
    rules = dataclasses.replace(rules, defense=rules.defense.calibrate(model, cohort(local).source))
    params, buffers = model.initial()
    params, state = rules.defense.settle(params, rules.defense.init_server(params))
    server = Server(params, buffers, state)
    return play_round(rules, server, {}, cohort(local), observed=CLIENTS, ranks=ranks)


def meeting(update: Update, num_clients: int, weights: tuple[int, ...] | None = None) -> Meeting:
    return Meeting(
        seed=1, round_index=3, clients=tuple(range(num_clients)), weights=weights or (1,) * num_clients, like=update,
        buffers={}, shared={}, codec=DENSE,
    )  # fmt: skip


def step(total_weight: int, clip: float, bits: int = 32) -> float:
    """The largest power of two with total_weight * (clip * step + 1) < 2^(bits-1), by trial."""
    steps = 2.0**-40
    while total_weight * (clip * steps * 2 + 1) < 2 ** (bits - 1):
        steps *= 2
    return 1 / steps


def quantised_mean(values: list[Tensor], weights: list[int], unit: float) -> Tensor:
    """In Python's integers, which never wrap."""
    entries = []
    for column in zip(*(v.reshape(-1).tolist() for v in values), strict=True):
        total = sum(round(x * w / unit) for x, w in zip(column, weights, strict=True))
        entries.append(total * unit / sum(weights))
    return torch.tensor(entries, dtype=torch.float64).view(values[0].shape)


@pytest.mark.parametrize("settings", [{}, {"bits": 16, "clip": 1.0, "buffer_clip": 4.0}, {"dropout": 0.4}])
def test_the_mean_is_that_of_the_quantised_updates_of_those_who_stayed(settings: dict[str, Any]) -> None:
    secure = Secure(**settings)
    open_, masked = play(Plain()), play(secure)
    transcript = open_.transcript
    assert transcript is not None
    assert len(masked.dropped) == (2 if settings.get("dropout") else 0)
    weights = {c: w for c, w in zip(CLIENTS, SIZES, strict=True) if c not in masked.dropped}
    unit = step(sum(SIZES), secure.clip, secure.bits)
    for name, got in masked.aggregate.items():
        values = [transcript.updates[c][name] for c in weights]
        assert torch.equal(got, quantised_mean(values, list(weights.values()), unit)), name
    params, buffers = victim().initial()
    for name, begun in buffers.items():
        changes = [(transcript.sent_buffers[c][name] - begun).double() for c in weights]
        unit = step(sum(SIZES), secure.buffer_clip, secure.bits) if begun.is_floating_point() else 1.0
        mean = quantised_mean(changes, list(weights.values()), unit)
        expected = begun + (mean if begun.is_floating_point() else mean.round().long())
        torch.testing.assert_close(masked.buffers[name], expected, rtol=1e-14, atol=0)
    assert set(params) == set(masked.aggregate)


def test_the_mean_is_the_plain_one_up_to_half_a_step_per_client() -> None:
    plain, masked = play(Plain()), play(Secure())
    bound = len(SIZES) * step(sum(SIZES), 8.0) / 2 / sum(SIZES)
    differences = [float((masked.aggregate[k] - v).abs().max()) for k, v in plain.aggregate.items()]
    assert 0 < max(differences) <= bound * 1.001
    bound = len(SIZES) * step(sum(SIZES), 1024.0) / 2 / sum(SIZES)
    for name, value in plain.buffers.items():
        assert float((masked.buffers[name] - value).abs().max()) <= bound * 1.001
    assert masked.loss == pytest.approx(plain.loss)
    assert masked.transcript is not None and plain.transcript is not None
    assert masked.transcript.num_examples == plain.transcript.num_examples


def test_masks_cancel_exactly_whatever_the_order_of_arrival() -> None:
    updates = [{"w": torch.randn(50, generator=stream(0, str(c)), dtype=torch.float64)} for c in range(4)]
    results = []
    for order in itertools.permutations(range(4)):
        gathering = Secure().begin(meeting(updates[0], 4, (1, 2, 3, 4)))
        for member in order:
            gathering.receive(member, 1, updates[member], {})
        results.append(gathering.means((), Alone())[0]["w"])
    assert all(torch.equal(r, results[0]) for r in results)
    assert torch.equal(results[0], quantised_mean([u["w"] for u in updates], [1, 2, 3, 4], step(10, 8.0)))


@pytest.mark.parametrize("gone", [(), (0,), (3,), (1, 2), (0, 2, 4)])
def test_whoever_is_gone_takes_no_mask_along(gone: tuple[int, ...]) -> None:
    updates = [{"w": torch.randn(20, generator=stream(0, str(c)), dtype=torch.float64)} for c in range(5)]
    gathering = Secure().begin(meeting(updates[0], 5))
    stayed = [c for c in range(5) if c not in gone]
    for member in stayed:
        gathering.receive(member, 1, updates[member], {})
    mean = gathering.means(gone, Alone())[0]["w"]
    assert torch.equal(mean, quantised_mean([updates[c]["w"] for c in stayed], [1] * len(stayed), step(5, 8.0)))
    if gone:
        wrong = gathering.means((), Alone())[0]["w"]
        assert not torch.isclose(wrong, mean, rtol=1e-3).any(), "the masks of those who are gone did not matter"


@pytest.mark.parametrize("value", [0.0, 7.9])
@pytest.mark.parametrize("bits", [16, 32])
def test_what_the_server_sees_of_one_client_is_uniform_whatever_the_client_sends(value: float, bits: int) -> None:
    update = {"w": torch.full((40_000,), value)}
    gathering = Secure(bits=bits).begin(meeting(update, 3))
    rows = [gathering.receive(member, 1, update, {}).payload.tensors[0].long() for member in range(3)]
    half = 1 << (bits - 1)
    for row in (*rows, (rows[0] + rows[1] + half) % (2 * half) - half):
        assert -half <= int(row.min()) and int(row.max()) < half
        for shift in (0, bits - 8):  # the lowest and the highest byte
            counts = torch.bincount(((row + half) >> shift) & 255, minlength=256)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-4
        for bit in range(bits):
            ones = int((((row + half) >> bit) & 1).sum())
            assert abs(ones - len(row) / 2) < 5 * (len(row) / 4) ** 0.5
        assert abs(float(torch.corrcoef(torch.stack([row[:-1], row[1:]]).double())[0, 1])) < 5 / len(row) ** 0.5
    assert int(rows[0][-1]) != 1, "the weight is masked too"


def test_no_mask_is_used_twice() -> None:
    update = {"w": torch.zeros(100)}
    rows = []
    for seed, round_index in ((1, 0), (1, 1), (2, 0)):
        gathering = Secure().begin(dataclasses.replace(meeting(update, 3), seed=seed, round_index=round_index))
        rows += [gathering.receive(member, 1, update, {}).payload.tensors[0] for member in range(3)]
    for one, other in itertools.combinations(rows, 2):
        assert int((one == other).sum()) <= 1


def test_no_single_update_and_no_count_is_in_the_transcript() -> None:
    transcript = play(Secure(dropout=0.2), defense=DGP()).transcript
    assert transcript is not None
    assert len(transcript.payloads) == 4 and not transcript.updates
    assert not transcript.sent_buffers and not transcript.evidence
    for payload in transcript.payloads.values():
        assert payload.codec == "masked" and payload.num_examples == 0
        assert [t.dtype for t in payload.tensors] == [torch.int32]


def test_every_coordinate_takes_the_bytes_of_a_ring_element_however_sparse_the_update() -> None:
    params, buffers = victim().initial()
    entries = sum(t.numel() for t in (params | buffers).values()) + 1
    around = KEYS + 4 * (SEALED + SHARE) + TOTAL_WEIGHT
    for bits in (16, 32):
        played = play(Secure(bits=bits, clip=2.0, buffer_clip=4.0), defense=DGP())
        assert set(played.uplink_bytes.values()) == {entries * bits // 8 + around}
    assert Secure().downlink_bytes(5) == 4 * (KEYS + SEALED) + TOTAL_WEIGHT
    assert Plain().downlink_bytes(5) == 0


MASKED: dict[str, Defense] = {
    "adgp": ADGP(),
    "chain": Chain(stages={"a": ADGP()}),
    "pruned": Pruned(inner=NoDefense(), method=RandomMask(density=0.25)),
    "pruned_dgp": Pruned(inner=DGP(), method=RandomMask(density=0.25)),
}


@pytest.mark.parametrize("name", MASKED)
def test_values_on_an_announced_mask_travel_without_the_rest(name: str) -> None:
    defense = MASKED[name]
    plain, masked = play(Plain(), defense=defense), play(Secure(), defense=defense)
    transcript = masked.transcript
    assert transcript is not None
    params, buffers = victim().initial()
    kept = {k.split("mask.", 1)[1]: v for k, v in transcript.shared.items()}
    sent = sum(int(kept[k].sum()) if k in kept else p.numel() for k, p in params.items())
    sizes = {p.tensors[0].numel() for p in transcript.payloads.values()}
    assert sizes == {sent + sum(b.numel() for b in buffers.values()) + 1}
    assert sent < 0.5 * sum(p.numel() for p in params.values())
    bound = len(SIZES) * step(sum(SIZES), 8.0) / 2 / sum(SIZES)
    for k, v in plain.aggregate.items():
        assert float((masked.aggregate[k] - v).abs().max()) <= bound * 1.001
        if k in kept:
            assert not masked.aggregate[k][~kept[k]].any()


def test_loop_and_vmap_give_the_same_sums() -> None:
    loop = play(Secure(dropout=0.2), executor=Loop())
    for chunk_size in (1, 2, 16):
        mapped = play(Secure(dropout=0.2), executor=Vmap(chunk_size=chunk_size))
        assert mapped.dropped == loop.dropped
        # an update may be rounded the other way: one step of one client
        torch.testing.assert_close(mapped.aggregate, loop.aggregate, rtol=0, atol=step(sum(SIZES), 8.0))
        torch.testing.assert_close(mapped.buffers, loop.buffers, rtol=0, atol=step(sum(SIZES), 1024.0))


class _Threads:
    """Ranks that are threads of this process."""

    def __init__(self, index: int, count: int, desk: dict[int, Any], barrier: threading.Barrier) -> None:
        self.index, self.count, self.desk, self.barrier = index, count, desk, barrier

    def gather(self, value: T) -> list[T]:
        self.desk[self.index] = value
        self.barrier.wait()
        values = [self.desk[i] for i in range(self.count)]
        self.barrier.wait()
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor)).sum(0)


@pytest.mark.parametrize("count", [2, 7])
def test_ranks_sum_what_one_process_sums(count: int) -> None:
    alone = play(Secure(dropout=0.2), executor=Loop())
    desk: dict[int, Any] = {}
    barrier, played = threading.Barrier(count, timeout=60), {}
    models = [victim() for _ in range(count)]  # a functional call swaps tensors of its module

    def share(rank: int) -> None:
        ranks = _Threads(rank, count, desk, barrier)
        played[rank] = play(Secure(dropout=0.2), executor=Loop(), ranks=ranks, model=models[rank])

    threads = [threading.Thread(target=share, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(count):
        assert all(torch.equal(played[rank].aggregate[k], v) for k, v in alone.aggregate.items())
        assert all(torch.equal(played[rank].buffers[k], v) for k, v in alone.buffers.items())
        assert played[rank].uplink_bytes == alone.uplink_bytes and played[rank].dropped == alone.dropped


@dataclasses.dataclass(frozen=True)
class _Broken(Defense):
    """Sends NaN where the client's first image begins darker than the threshold."""

    threshold: float

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        bad = client.batch.inputs.flatten()[0] < self.threshold
        return {k: torch.where(bad, torch.nan, v) for k, v in update.items()}, state


def test_a_client_without_a_finite_update_is_taken_out_of_the_masks_too() -> None:
    firsts = sorted(float(cohort(FedAvg(epochs=1, batch_size=3)).batch([m]).inputs.flatten()[0]) for m in range(5))
    broken = _Broken(firsts[1] + 1e-9)
    settings: dict[str, Any] = {"defense": broken, "on_nonfinite": "drop_client"}
    plain, masked = play(Plain(), **settings), play(Secure(), **settings)
    assert masked.dropped == plain.dropped and len(masked.dropped) == 2
    torch.testing.assert_close(masked.aggregate, plain.aggregate, rtol=0, atol=step(sum(SIZES), 8.0))
    torch.testing.assert_close(masked.buffers, plain.buffers, rtol=0, atol=step(sum(SIZES), 1024.0))
    with pytest.raises(NonFiniteError, match=r"only 1 of 5 clients sent a finite update"):
        play(Secure(), defense=_Broken(firsts[3] + 1e-9), on_nonfinite="drop_client")
    with pytest.raises(NonFiniteError, match=r"Client \d+ sent NaN or infinity in round 0"):
        play(Secure(), defense=broken)


def test_those_who_vanish_are_drawn_anew_each_round_and_keep_their_states() -> None:
    update = {"w": torch.zeros(3)}
    begun = [dataclasses.replace(meeting(update, 10), round_index=r) for r in range(200)]
    vanished = [Secure(dropout=0.3).begin(m).vanished for m in begun]
    assert {len(v) for v in vanished} == {3} and len(set(vanished)) > 50
    share = [sum(c in v for v in vanished) / 200 for c in range(10)]
    assert all(abs(s - 0.3) < 0.15 for s in share)
    played = play(Secure(dropout=0.4), defense=DGP())
    assert len(played.dropped) == 2
    assert set(played.states) == set(played.uplink_bytes) == set(CLIENTS) - set(played.dropped)


def test_a_value_that_does_not_fit_names_client_round_and_tensor() -> None:
    update = {"w": torch.tensor([0.5, -8.5])}
    gathering = Secure().begin(meeting(update, 2))
    with pytest.raises(
        WireError, match=r"Client 1 in round 3 has 8\.5 in 'w', but up to 8 fits .*raise aggregation\.clip"
    ):
        gathering.receive(1, 1, update, {})
    largest = {"w": torch.tensor([8.0, -8.0])}
    for weights in ((1, 1), (1000, 2000)):
        gathering = Secure().begin(meeting(largest, 2, weights))
        for member in (0, 1):
            gathering.receive(member, 1, largest, {})
        assert gathering.means((), Alone())[0]["w"].tolist() == [8.0, -8.0]
    counter = {"n": torch.tensor(0)}
    gathering = Secure(bits=16).begin(dataclasses.replace(meeting(update, 2), buffers=counter))
    with pytest.raises(WireError, match=r"Client 0 in round 3 has 2e\+04 in 'n'.*raise aggregation\.bits"):
        gathering.receive(0, 1, {"w": torch.zeros(2)}, {"n": torch.tensor(20_000)})
    unknown = {"m": torch.tensor(torch.nan)}
    gathering = Secure().begin(dataclasses.replace(meeting(update, 2), buffers=unknown))
    with pytest.raises(WireError, match=r"Client 0 in round 3 has nan in 'm'"):
        gathering.receive(0, 1, largest, unknown)


def test_evidence_is_summed_behind_the_masks_and_of_booleans_comes_the_share_that_is_true() -> None:
    owns = [torch.tensor([True, False, i == 0]) for i in range(3)]
    sent = [{"w": torch.zeros(3), "evidence.w": own} for own in owns]
    gathering = Secure().begin(meeting(sent[0], 3, (2, 1, 1)))
    for member in range(3):
        gathering.receive(member, 1, sent[member], {})
    share = gathering.means((), Alone())[0]["evidence.w"]
    assert share.dtype == torch.float64 and share.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "aggregation.bits=8 is not known"),
        ({"clip": 0.0}, "aggregation.clip=0.0 must be a finite number above 0"),
        ({"buffer_clip": float("inf")}, "aggregation.buffer_clip=inf"),
        ({"dropout": 1.0}, r"aggregation.dropout=1.0 must be in \[0, 1\)"),
        ({"threshold": 1}, "aggregation.threshold=1 must be a whole number from 2 on"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Secure(**settings)


def test_too_few_clients_or_too_small_a_ring_are_refused() -> None:
    update = {"w": torch.zeros(3)}
    with pytest.raises(ConfigError, match=r"0 of 1 clients vanish, so fewer than aggregation\.threshold=2"):
        Secure().begin(meeting(update, 1))
    with pytest.raises(ConfigError, match="4 of 5 clients vanish"):
        Secure(dropout=0.8).begin(meeting(update, 5))
    with pytest.raises(ConfigError, match="weights that sum to 40000 leave no room"):
        Secure(bits=16).begin(meeting(update, 2, (20_000, 20_000)))


def test_an_attack_on_one_client_is_refused_where_clients_are_hidden() -> None:
    sees = {
        name: ThreatModel.named(name, [name, "num_examples"]) for name in ("update", "aggregate")
    }  # fmt: skip
    with pytest.raises(IncompatibleError, match=r"uniform noise.*choose threat=secure_aggregation"):
        check_aggregation("dlg", sees["update"], Secure())
    check_aggregation("dlg", sees["aggregate"], Secure())
    check_aggregation("dlg", sees["update"], Plain())
    check_aggregation("dlg", sees["aggregate"], Plain())
