"""Rounding, pruning and clipping against plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad

from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.precision import HalfPrecision, Int8
from gia_bench.defenses.quantize import QSGD, SignSGD
from gia_bench.defenses.sparsify import GradientCompression, RandomK, Threshold
from gia_bench.seeding import stream
from gia_bench.values import Observation
from gia_bench.wire import SPARSE

ANY: Any = None  # the client and batch, which these defenses do not look at
OFF = ErrorFeedback(enabled=False)
UPDATE = {
    "w": torch.randn(40, 30, generator=stream(0, "w")),
    "b": 5 * torch.randn(30, generator=stream(0, "b")),
    "s": torch.tensor(-0.3),
}


def test_half_precision_is_numpys() -> None:
    sent, _ = HalfPrecision().protect(UPDATE, ANY, {}, {}, {})
    for name, u in UPDATE.items():
        np.testing.assert_array_equal(sent[name].numpy(), u.numpy().astype(np.float16).astype(np.float32))


def test_bfloat16_keeps_eight_significant_bits() -> None:
    sent, _ = HalfPrecision(dtype="bfloat16").protect(
        {"w": torch.tensor([1 + 2**-7, 1 + 2**-9, 3e38])}, ANY, {}, {}, {}
    )
    assert sent["w"].tolist() == pytest.approx([1 + 2**-7, 1.0, 3e38], rel=2**-8)
    assert sent["w"][1] == 1


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_int8_rounds_to_the_nearest_of_255_values(scope: str) -> None:
    sent, _ = Int8(scope=scope).protect(UPDATE, ANY, {}, {}, {})
    largest = max(float(u.abs().max()) for u in UPDATE.values())
    for name, u in UPDATE.items():
        most = largest if scope == "global" else float(u.abs().max())
        expected = np.round(u.double().numpy() * 127 / most) * most / 127
        # the unit is rounded up to 16 bits: an entry half-way may then fall to the other side
        off = np.abs(sent[name].double().numpy() - expected)
        assert (off <= 2**-14 * most).mean() > 0.97
        assert np.abs(sent[name].numpy() - u.numpy()).max() <= 0.501 * most / 127


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    entries = torch.tensor([1.0, -0.3, 0.01, 0.0, 0.6543])
    update = {"w": entries.repeat(20_000, 1)}
    for defense in (Int8(rounding="stochastic"), QSGD(levels=7), QSGD(levels=1)):
        sent, _ = defense.protect(update, ANY, {}, {}, defense.draw(update, ANY, stream(3)))
        unit = float(sent["w"].abs()[sent["w"] != 0].min())
        # five standard errors of a rounding of at most one unit, which has a deviation of at most half a unit
        assert torch.allclose(sent["w"].mean(0), entries, atol=5 * 0.5 * unit / math.sqrt(20_000))
        assert not sent["w"][:, 3].any()


def test_qsgd_is_the_papers_formula() -> None:
    defense = QSGD(levels=4)
    noise = defense.draw(UPDATE, ANY, stream(4))
    sent, _ = defense.protect(UPDATE, ANY, {}, {}, noise)
    for name, u in UPDATE.items():
        norm = math.sqrt(float((u.double() ** 2).sum()))
        share = np.abs(u.double().numpy()) / norm * 4
        below, sign, uniform = np.floor(share), np.sign(u.numpy()), noise[name].double().numpy()
        # the uniform number decides between two neighbours; for negative entries it counts from the other end
        up = np.where(sign > 0, uniform >= 1 - (share - below), uniform < share - below)
        np.testing.assert_allclose(sent[name].numpy(), norm * sign * (below + up) / 4, rtol=1e-4, atol=0)


def test_signs_carry_the_mean_magnitude() -> None:
    update = {"w": torch.tensor([1.0, -2.0, 0.0, 5.0])}
    assert SignSGD().protect(update, ANY, {}, {}, {})[0]["w"].tolist() == [2, -2, 2, 2]
    assert SignSGD(scale="none").protect(update, ANY, {}, {}, {})[0]["w"].tolist() == [1, -1, 1, 1]


@pytest.mark.parametrize("prune", [0.0, 0.1, 0.5, 0.8, 0.9, 0.99])
def test_gradient_compression_is_the_references_percentile(prune: float) -> None:
    for n in [1, 2, 3, 5, 10, 11, 100, 101, 999]:
        distinct = np.random.default_rng(n).normal(size=n).astype(np.float32)
        for entries in (distinct, distinct.round()):
            threshold = np.percentile(np.abs(entries).astype(np.float64), 100 * prune)
            expected = np.where(np.abs(entries) < threshold * (1 - 1e-12), 0, entries)
            sent, _ = GradientCompression(prune=prune).protect({"w": torch.from_numpy(entries)}, ANY, {}, {}, {})
            np.testing.assert_array_equal(sent["w"].numpy(), expected)


def test_the_threshold_keeps_what_reaches_it_and_feedback_sends_the_rest_in_time() -> None:
    update = {"w": torch.tensor([0.1, -0.5, 0.3, 0.0])}
    assert Threshold(value=0.3, error_feedback=OFF).protect(update, ANY, {}, {}, {})[0]["w"].tolist() == [
        0, -0.5, pytest.approx(0.3), 0,
    ]  # fmt: skip
    defense = Threshold(value=0.35)
    state, total = defense.init_client(update), torch.zeros(4)
    for _ in range(8):
        sent, state = defense.protect(update, ANY, state, {}, {})
        total += sent["w"]
    assert torch.allclose(total + state["residual.w"], 8 * update["w"])
    assert total[0] > 0


@pytest.mark.parametrize("keep", [0.01, 0.2, 1.0])
def test_random_k_sends_the_drawn_share_and_every_entry_is_as_likely(keep: float) -> None:
    defense = RandomK(keep=keep, error_feedback=OFF)
    noise = defense.draw(UPDATE, ANY, stream(5))
    sent, _ = defense.protect(UPDATE, ANY, {}, {}, noise)
    for name, u in UPDATE.items():
        assert int((sent[name] != 0).sum()) == math.ceil(keep * u.numel() - 1e-9)
        assert torch.equal(sent[name], u * (sent[name] != 0))
    counts = torch.stack([defense.draw({"w": torch.zeros(10)}, ANY, stream(6, i))["w"] for i in range(2000)]).sum(0)
    expected = 2000 * math.ceil(keep * 10 - 1e-9) / 10
    assert float((counts - expected).abs().max()) <= 5 * math.sqrt(2000 * 0.25)
    assert defense.codec is SPARSE


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("max_norm", [0.5, 10.0, 100.0, 1e4])
def test_clipping_is_numpys_joint_norm(norm: int, max_norm: float) -> None:
    sent, _ = ClipUpdate(max_norm=max_norm, norm=norm).protect(UPDATE, ANY, {}, {}, {})
    length = np.linalg.norm(np.concatenate([u.numpy().ravel() for u in UPDATE.values()]).astype(np.float64), norm)
    for name, u in UPDATE.items():
        np.testing.assert_allclose(sent[name].numpy(), u.numpy() * min(1, max_norm / length), rtol=1e-6)


def test_clipping_gives_the_same_bits_in_a_loop_and_under_vmap() -> None:
    many = {"w": torch.randn(20, 300, 31, generator=stream(8)), "b": torch.randn(20, 77, generator=stream(9))}
    defense = ClipUpdate(max_norm=1.0)
    together, _ = torch.vmap(lambda u: defense.protect(u, ANY, {}, {}, {}))(many)
    for i in range(20):
        alone, _ = defense.protect({k: u[i] for k, u in many.items()}, ANY, {}, {}, {})
        assert all(torch.equal(together[k][i], u) for k, u in alone.items())


def test_clipping_equals_torchs_own() -> None:
    weights = [torch.zeros_like(u, requires_grad=True) for u in UPDATE.values()]
    for w, u in zip(weights, UPDATE.values(), strict=True):
        w.grad = u.clone()
    torch.nn.utils.clip_grad_norm_(weights, 3.0)
    sent, _ = ClipUpdate(max_norm=3.0).protect(UPDATE, ANY, {}, {}, {})
    for w, s in zip(weights, sent.values(), strict=True):
        assert w.grad is not None
        assert torch.allclose(w.grad, s, rtol=1e-5)


def test_a_clipped_update_is_a_fixed_point_of_the_surrogate_and_a_zero_dummy_has_a_gradient() -> None:
    defense = ClipUpdate(max_norm=2.0)
    sent, _ = defense.protect(UPDATE, ANY, {}, {}, {})
    seen = Observation(params=UPDATE, update=sent)
    assert all(torch.equal(s, sent[k]) for k, s in defense.surrogate(UPDATE, seen).items())
    gradient = grad(lambda d: defense.surrogate(d, seen)["w"].sum())(
        {k: torch.zeros_like(u) for k, u in UPDATE.items()}
    )
    assert torch.equal(gradient["w"], torch.ones(40, 30))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_hides_no_broken_client(bad: float) -> None:
    sent, _ = ClipUpdate().protect({"w": torch.tensor([1.0, bad])}, ANY, {}, {}, {})
    assert not sent["w"].isfinite().all()


def test_residuals_are_kept_where_they_are_wanted() -> None:
    for defense in (GradientCompression(error_feedback=ErrorFeedback()), RandomK(), Threshold(value=0.5)):
        state = defense.init_client(UPDATE)
        sent, state = defense.protect(UPDATE, ANY, state, {}, defense.draw(UPDATE, ANY, stream(7)))
        for name, u in UPDATE.items():
            assert torch.equal(sent[name] + state["residual." + name], u)
        assert 0 < defense.measure(state)["never_sent_share"] < 1
    assert GradientCompression().init_client(UPDATE) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_sent_whatever_is_selected_and_is_not_remembered(bad: float) -> None:
    update = {"w": torch.tensor([1.0, bad, 0.25, bad])}
    chosen = {"w": torch.tensor([True, True, False, False])}
    feedback = ErrorFeedback()
    sent, state = feedback.send(update, feedback.initial(update), lambda full: chosen)
    assert sent["w"].isfinite().tolist() == [True, False, True, False]
    assert torch.equal(sent["w"][1:2].isinf(), update["w"][1:2].isinf())
    assert torch.equal(state["residual.w"], torch.tensor([0.0, 0.0, 0.25, 0.0]))
    assert state["sent.w"].tolist() == [True, True, False, True]


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("size", [0.1, 10.0])
def test_clipping_can_be_differentiated_twice_beside_a_tensor_of_zeros(norm: int, size: float) -> None:
    defense = ClipUpdate(max_norm=1.0, norm=norm)

    def value(u: Tensor) -> Tensor:
        sent = defense.surrogate({"zero": u * 0, "other": u}, ANY)
        return sent["other"].square().sum() + sent["zero"].square().sum()

    assert torch.func.jacrev(torch.func.jacrev(value))(size * torch.ones(3)).isfinite().all()
