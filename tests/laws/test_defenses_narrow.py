"""What few bits can hold comes back bit for bit, in the size that was promised."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gia_bench.defenses.base import Defense
from gia_bench.defenses.grid import unit_above
from gia_bench.defenses.precision import HalfPrecision, Int8
from gia_bench.defenses.quantize import QSGD, SignSGD
from gia_bench.errors import WireError
from gia_bench.seeding import stream
from gia_bench.values import Update
from gia_bench.wire import Cast, Codec, Codes, Narrow, Signs

ANY: Any = None  # the client and batch, which these defenses do not look at
NARROW: list[tuple[Defense, float, int]] = [  # defense, bits per entry, bytes per tensor beside them
    (HalfPrecision(dtype="float16"), 16, 0),
    (HalfPrecision(dtype="bfloat16"), 16, 0),
    (Int8(), 8, 4),
    (Int8(rounding="stochastic"), 8, 4),
    (Int8(scope="global"), 8, 4),
    (QSGD(levels=1), 2, 4),
    (QSGD(levels=2), 3, 4),
    (QSGD(levels=7), 4, 4),
    (QSGD(levels=63), 7, 4),
    (QSGD(levels=127), 8, 4),
    (SignSGD(), 1, 4),
    (SignSGD(scale="none"), 1, 4),
]
CODECS: list[Codec] = [
    *(Narrow(Cast(d)) for d in (torch.float16, torch.bfloat16)), *(Narrow(Codes(n)) for n in (1, 2, 7, 127)),
    Narrow(Signs()),
]  # fmt: skip
shapes = st.sampled_from([(), (0,), (1,), (3,), (7, 5), (40,), (4, 3, 3, 3), (1000,)])


@st.composite
def updates(draw: st.DrawFn) -> Update:
    """Finite updates of any size, with zeros of both signs, ties and subnormal numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e-30, 1e-42, 100.0]))
    grain = draw(st.booleans())
    update = {}
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True)):
        shape = draw(shapes)
        numbers = torch.randn(shape, generator=generator)
        numbers = numbers.round() if grain else numbers
        zero = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
        update[name] = torch.where(zero, -0.0, numbers * scale)
    return update


def protected(defense: Defense, update: Update) -> Update:
    return defense.protect(update, ANY, {}, {}, defense.draw(update, ANY, stream(0, "noise")))[0]


def same_bits(a: Update, b: Update) -> bool:
    return list(a) == list(b) and all(
        a[k].shape == b[k].shape and torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in b
    )


@pytest.mark.parametrize(("defense", "bits", "beside"), NARROW, ids=str)
@settings(deadline=None, max_examples=60)
@given(update=updates())
def test_what_is_protected_comes_back_bit_for_bit(defense: Defense, bits: float, beside: int, update: Update) -> None:
    sent = protected(defense, update)
    payload = defense.codec.encode(sent, {}, 3)
    assert payload.num_examples == 3
    assert same_bits(defense.codec.decode(payload, update, {}), sent)


@pytest.mark.parametrize(("defense", "bits", "beside"), NARROW, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-8, 30.0])
def test_a_payload_has_the_promised_size(defense: Defense, bits: float, beside: int, scale: float) -> None:
    g = stream(1, "update")
    update = {"w": scale * torch.randn(37, 21, generator=g), "b": scale * torch.randn(37, generator=g)}
    payload = defense.codec.encode(protected(defense, update), {}, 1)
    entries = sum(u.numel() for u in update.values())
    assert payload.num_bytes == math.ceil(bits * entries / 8) + (beside + 1) * len(update)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@settings(deadline=None, max_examples=60)
@given(update=updates(), special=st.sampled_from([math.nan, math.inf, -0.0, 1e38]))
def test_what_few_bits_cannot_hold_travels_as_it_is(codec: Codec, update: Update, special: float) -> None:
    for u in update.values():
        if u.numel() > 2:
            u.view(-1)[1] = special
    payload = codec.encode(update, {}, 1)
    assert same_bits(codec.decode(payload, update, {}), update)
    assert payload.num_bytes <= sum(u.nbytes + 1 for u in update.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beside", [0, 1, 5, 13, 29])
def test_nan_comes_back_with_its_bits_wherever_it_stands(beside: int, dtype: torch.dtype) -> None:
    update = {"a": torch.full((beside,), 1e-3), "b": torch.tensor([0.0, math.nan, -0.0])}
    codec = Narrow(Cast(dtype))
    assert same_bits(codec.decode(codec.encode(update, {}, 1), update, {}), update)


def test_the_mean_of_two_clients_is_not_packed_and_loses_nothing() -> None:
    g = stream(2, "updates")
    sent = [protected(SignSGD(), {"w": torch.randn(100, generator=g)}) for _ in range(2)]
    mean = {"w": (sent[0]["w"] + sent[1]["w"]) / 2}
    assert same_bits(SignSGD().codec.decode(SignSGD().codec.encode(mean, {}, 1), mean, {}), mean)


@pytest.mark.parametrize(("defense", "bits", "beside"), NARROW, ids=str)
@settings(deadline=None, max_examples=30)
@given(rows=st.lists(updates(), min_size=1, max_size=1))
def test_a_loop_and_vmap_round_to_the_same_bits(defense: Defense, bits: float, beside: int, rows: list[Update]) -> None:
    clients = [
        rows[0],
        {k: -2 * u for k, u in rows[0].items()},
        {k: u.flip(0) if u.ndim else u for k, u in rows[0].items()},
    ]
    noises = [defense.draw(c, ANY, stream(0, i)) for i, c in enumerate(clients)]

    def stack(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.stack([p[k] for p in parts]) for k in parts[0]}

    together = torch.vmap(lambda u, n: defense.protect(u, ANY, {}, {}, n)[0])(stack(clients), stack(noises))
    for i, (client, noise) in enumerate(zip(clients, noises, strict=True)):
        alone = defense.protect(client, ANY, {}, {}, noise)[0]
        assert same_bits({k: t[i] for k, t in together.items()}, alone)


@pytest.mark.parametrize(("defense", "bits", "beside"), NARROW, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_reach_the_server(defense: Defense, bits: float, beside: int, bad: float) -> None:
    update = {"w": torch.linspace(-1, 1, 50)}
    update["w"][7] = bad
    assert not protected(defense, update)["w"].isfinite().all()


@settings(deadline=None)
@given(step=st.floats(2**-120, 2**100, width=32))
def test_a_unit_is_never_below_its_step_and_its_multiples_are_exact(step: float) -> None:
    unit = float(unit_above(torch.tensor(step, dtype=torch.float64)))
    assert step <= unit <= step * (1 + 2**-15)
    multiples = torch.arange(1, 256) * torch.tensor(unit)
    assert multiples.double().tolist() == [k * unit for k in range(1, 256)]


def test_a_payload_of_another_codec_or_model_is_refused() -> None:
    update = {"w": torch.ones(8)}
    codec = Narrow(Signs())
    payload = codec.encode(update, {}, 1)
    with pytest.raises(WireError, match="signs payload holds 1 tensors"):
        codec.decode(payload, {}, {})
    with pytest.raises(WireError, match="codes7 expects"):
        Narrow(Codes(7)).decode(payload, update, {})
    half = Narrow(Cast(torch.float16))
    with pytest.raises(WireError, match=r"holds 16 packed bytes and 0 torch\.float32 entries, .* needs 18 and 0"):
        half.decode(half.encode(update, {}, 1), {"w": torch.ones(9)}, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2e-8, 8e-8, 1e-6, 9.6e-6, 2.5e-5, 0.73, 60.0])
@pytest.mark.parametrize("defense", [Int8(), Int8(rounding="stochastic"), QSGD(levels=127), QSGD(levels=7)])
def test_half_precision_is_rounded_to_few_multiples_of_a_unit(
    defense: Int8 | QSGD, size: float, dtype: torch.dtype
) -> None:
    update = {
        "half": (torch.randn(500, generator=stream(0)) * size).to(dtype), "single": torch.randn(9, generator=stream(1))
    }  # fmt: skip
    sent, _ = defense.protect(update, ANY, {}, {}, defense.draw(update, ANY, stream(2)))
    assert all(sent[name].dtype == u.dtype and sent[name].isfinite().all() for name, u in update.items())
    levels = 127 if isinstance(defense, Int8) else defense.levels
    assert len(sent["half"].unique()) <= 2 * levels + 1
    payload = defense.codec.encode(sent, {}, 1)
    again = defense.codec.decode(payload, update, {})
    assert all(torch.equal(again[name], u) for name, u in sent.items())
    if defense == Int8():
        assert defense.codec.encode({"half": sent["half"]}, {}, 1).num_bytes <= 500 + 8
