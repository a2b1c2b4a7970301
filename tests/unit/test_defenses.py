from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import Defense
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError
from gia_bench.seeding import stream
from gia_bench.values import Observation
from gia_bench.wire import ALIGNED, SPARSE

ANY: Any = None  # the client and batch, which these defenses do not look at
OFF = ErrorFeedback(enabled=False)


def pruned(defense: Defense, entries: list[float]) -> list[float]:
    update = {"w": torch.tensor(entries)}
    sent, _ = defense.protect(update, ANY, defense.init_client(update), {}, {})
    return sent["w"].tolist()


def test_no_defense_sends_the_update_itself() -> None:
    update = {"w": torch.randn(3)}
    sent, state = NoDefense().protect(update, ANY, {}, {}, {})
    assert sent["w"] is update["w"]
    assert state == {}


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [0]), (2, [1]), (3, [2]), (4, [3]), (5, [4]), (6, [4, 5]), (20, [15, 16, 17, 18]), (40, list(range(30, 38)))],
)
def test_tiny_tensors_send_the_entries_that_the_docstring_says(n: int, expected: list[int]) -> None:
    mask = DGP().select({"w": torch.arange(1.0, n + 1)})["w"]
    assert mask.nonzero().view(-1).tolist() == expected


def test_a_one_element_tensor_is_sent_whatever_its_shape() -> None:
    for shape in ((), (1,), (1, 1, 1)):
        update = {"w": torch.full(shape, -3.0)}
        sent, _ = DGP().protect(update, ANY, DGP().init_client(update), {}, {})
        assert torch.equal(sent["w"], update["w"])


def test_counts_are_of_the_decimal_share_that_was_written() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point
    assert DGP(k1=0.29, k2=0.57).select({"w": torch.arange(100.0)})["w"].nonzero().view(-1).tolist() == [*range(57, 71)]
    assert pruned(DGP(k1=0.05, k2=0.0), [float(i) for i in range(20)])[-1] == 0


def test_equal_magnitudes_rank_by_position() -> None:
    assert pruned(DGP(k1=0.25, k2=0.5), [1.0, -1.0, 1.0, -1.0]) == [0, -1, 0, 0]
    assert pruned(TopK(keep=0.5), [2.0, 2.0, -2.0, 2.0]) == [2, 2, 0, 0]


def test_a_zero_update_sends_zeros_and_takes_no_bytes_but_the_header() -> None:
    update = {"w": torch.zeros(4, 25), "b": torch.zeros(3)}
    defense = DGP()
    sent, state = defense.protect(update, ANY, defense.init_client(update), {}, {})
    assert not any(s.any() for s in sent.values())
    assert defense.codec.encode(sent, {}, 1).num_bytes == 2 * 8
    assert defense.measure(state) == {"residual_norm": 0, "never_sent_share": 1}


def test_an_update_with_one_large_entry_is_sent_as_nothing() -> None:
    assert pruned(DGP(), [0.0] * 19 + [5.0]) == [0.0] * 20


def test_a_coordinate_that_stays_among_the_largest_is_never_sent_and_its_residual_grows_linearly() -> None:
    defense = DGP(k1=0.05, k2=0.75)
    update = {"w": torch.cat([torch.full((5,), 1000.0), torch.linspace(0.5, 1, 95)])}
    state = defense.init_client(update)
    norms = []
    for round_index in range(1, 101):
        sent, state = defense.protect(update, ANY, state, {}, {})
        assert not sent["w"][:5].any()
        assert torch.equal(state["residual.w"][:5], torch.full((5,), 1000.0 * round_index))
        norms.append(float(defense.measure(state)["residual_norm"]))
    assert norms[99] == pytest.approx(10 * norms[9], rel=1e-3)
    assert norms[99] == pytest.approx(100 * 1000 * math.sqrt(5), rel=1e-3)
    assert defense.measure(state)["never_sent_share"] == pytest.approx(0.05)


def test_top_k_with_feedback_sends_every_coordinate_in_time() -> None:
    defense = TopK(keep=0.2)
    update = {"w": torch.linspace(0.5, 1, 100)}
    state = defense.init_client(update)
    for _ in range(20):
        _, state = defense.protect(update, ANY, state, {}, {})
    assert defense.measure(state)["never_sent_share"] == 0


def test_without_feedback_there_is_no_state_and_nothing_is_remembered() -> None:
    update = {"w": torch.arange(20.0)}
    for defense in (DGP(error_feedback=OFF), TopK(error_feedback=OFF), ADGP(error_feedback=OFF)):
        assert defense.init_client(update) == {}
        assert defense.measure({}) == {}
    first, state = DGP(error_feedback=OFF).protect(update, ANY, {}, {}, {})
    second, _ = DGP(error_feedback=OFF).protect(update, ANY, state, {}, {})
    assert state == {}
    assert torch.equal(first["w"], second["w"])


def test_scale_zero_equals_no_feedback() -> None:
    update = {"w": torch.arange(20.0)}
    defense = DGP(error_feedback=ErrorFeedback(scale=0))
    state = defense.init_client(update)
    for _ in range(3):
        sent, state = defense.protect(update, ANY, state, {}, {})
    assert torch.equal(sent["w"], DGP(error_feedback=OFF).protect(update, ANY, {}, {}, {})[0]["w"])


@pytest.mark.parametrize("defense", [DGP(), DGP(error_feedback=OFF), TopK(), DGP(scope="global")])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_reach_the_server_and_not_the_residual(defense: Defense, bad: float) -> None:
    update = {"w": torch.arange(40.0)}
    update["w"][7] = bad
    sent, state = defense.protect(update, ANY, defense.init_client(update), {}, {})
    assert not sent["w"][7].isfinite()
    assert sent["w"].isfinite().sum() == 39
    assert all(s.isfinite().all() for s in state.values())


def test_protect_changes_no_argument() -> None:
    update = {"w": torch.arange(40.0)}
    state = {name: s + 1 if s.dtype != torch.bool else s for name, s in DGP().init_client(update).items()}
    before = {name: s.clone() for name, s in state.items()}
    DGP().protect(update, ANY, state, {}, {})
    assert torch.equal(update["w"], torch.arange(40.0))
    assert all(torch.equal(state[name], s) for name, s in before.items())


def test_dtypes_survive_protection_and_global_scope_ranks_across_them() -> None:
    update = {"a": torch.arange(20.0).half(), "b": torch.arange(20.0, 40.0).double()}
    defense = TopK(keep=0.5, scope="global")
    sent, state = defense.protect(update, ANY, defense.init_client(update), {}, {})
    assert {s.dtype for s in sent.values()} == {torch.float16, torch.float64}
    assert state["residual.a"].dtype == torch.float16
    assert not sent["a"].any()
    assert torch.equal(sent["b"], update["b"])


def mask_of(defense: ADGP, updates: list[dict[str, Tensor]], round_index: int = 0, seed: int = 0) -> dict[str, Tensor]:
    state = defense.init_client(updates[0])

    def ask(position: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return updates[position], state

    return defense.announce(updates[0], {}, round_index, len(updates), stream(seed, "announce", round_index), ask)


def test_all_adgp_clients_send_exactly_the_leaders_entries() -> None:
    updates = [{"w": torch.randn(10, 10, generator=stream(0, c)), "b": torch.randn(7)} for c in range(4)]
    defense = ADGP()
    shared = mask_of(defense, updates)
    leader = DGP().select(updates[0])
    for update in updates:
        sent, state = defense.protect(update, ANY, defense.init_client(update), shared, {})
        for name in update:
            assert torch.equal(shared["mask." + name], leader[name])
            assert torch.equal(sent[name] != 0, leader[name])
            assert torch.equal(sent[name] + state["residual." + name], update[name])
        assert defense.codec is ALIGNED
        assert ALIGNED.encode(sent, shared, 1).num_bytes == 4 * sum(int(m.sum()) for m in leader.values())


def test_the_leaders_mask_is_of_its_update_with_its_residual() -> None:
    update = {"w": torch.arange(20.0)}
    residual = {"residual.w": 100 * torch.arange(20.0).flip(0), "sent.w": torch.zeros(20, dtype=torch.bool)}
    shared = ADGP().announce(update, {}, 0, 1, stream(0), lambda _: (update, residual))
    assert torch.equal(shared["mask.w"], DGP().select({"w": update["w"] + residual["residual.w"]})["w"])


@pytest.mark.parametrize(("leader", "expected"), [("first", [0, 0, 0, 0]), ("round_robin", [0, 1, 2, 0])])
def test_who_leads_is_a_choice(leader: str, expected: list[int]) -> None:
    updates = [{"w": torch.randn(40, generator=stream(1, c))} for c in range(3)]
    for round_index, position in enumerate(expected):
        shared = mask_of(ADGP(leader=leader), updates, round_index)
        assert torch.equal(shared["mask.w"], DGP().select(updates[position])["w"])


def test_a_random_leader_comes_from_the_given_stream_alone_and_can_be_anybody() -> None:
    updates = [{"w": torch.randn(40, generator=stream(2, c))} for c in range(3)]
    candidates = [DGP().select(u)["w"].tolist() for u in updates]
    defense = ADGP(leader="random")
    drawn = [mask_of(defense, updates, 0, seed)["mask.w"].tolist() for seed in range(30)]
    assert drawn == [mask_of(defense, updates, 0, seed)["mask.w"].tolist() for seed in range(30)]
    assert all(mask in candidates for mask in drawn)
    assert {candidates.index(mask) for mask in drawn} == {0, 1, 2}


@pytest.mark.parametrize("defense", [DGP(), TopK(), ADGP()])
def test_the_surrogate_shows_the_observed_support_and_is_differentiable_under_vmap(defense: Defense) -> None:
    seen = torch.tensor([0.0, 3.0, 0.0, -1.0])
    observation = Observation(params={"w": torch.zeros(4)}, update={"w": seen})
    dummies = torch.arange(1.0, 13).view(3, 4)

    def energy(dummy: Tensor) -> Tensor:
        return defense.surrogate({"w": dummy}, observation)["w"].square().sum()

    assert torch.equal(vmap(grad(energy))(dummies), 2 * dummies * (seen != 0))


def test_adgps_surrogate_prefers_the_announced_mask() -> None:
    mask = torch.tensor([True, True, False, False])
    observation = Observation(
        params={"w": torch.zeros(4)}, update={"w": torch.tensor([0.0, 1.0, 0.0, 0.0])}, shared={"mask.w": mask}
    )
    assert torch.equal(ADGP().surrogate({"w": torch.ones(4)}, observation)["w"], mask.float())


def test_pruning_packs_sparsely() -> None:
    assert DGP().codec is SPARSE
    assert TopK().codec is SPARSE


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DGP(k1=0.25, k2=0.75), r"k1 \+ k2 = 0.25 \+ 0.75 drops every entry"),
        (lambda: DGP(k1=0.7, k2=0.7), r"k1 \+ k2"),
        (lambda: DGP(k1=5), r"defense dgp: k1=5 must lie in \[0, 1\).*0.05 means 5 %"),
        (lambda: DGP(k2=-0.1), r"k2=-0.1 must lie"),
        (lambda: DGP(k2=math.nan), r"k2=nan must lie"),
        (lambda: DGP(k1="much"), r"k1=.much. must lie"),  # type: ignore[arg-type]
        (lambda: DGP(scope="layer"), r"scope='layer' is not known. Choose one of: global, tensor"),
        (lambda: ADGP(k1=1.0), r"defense adgp: k1=1.0"),
        (lambda: ADGP(leader="last"), r"leader='last' is not known. Choose one of: first, random, round_robin"),
        (lambda: TopK(keep=0), r"defense top_k: keep=0 must lie in \(0, 1\]"),
        (lambda: TopK(keep=20), r"keep=20"),
        (lambda: TopK(scope="all"), r"scope='all'"),
        (lambda: ErrorFeedback(scale=-1), r"error_feedback.scale=-1 must be finite and at least 0"),
        (lambda: ErrorFeedback(decay=1.5), r"error_feedback.decay=1.5 must lie in \[0, 1\]"),
        (lambda: ErrorFeedback(enabled="off"), r"enabled='off' must be true or false"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_out_of_range_is_refused_with_a_sentence(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()
