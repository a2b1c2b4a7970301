from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gia_bench.errors import WireError
from gia_bench.wire import ALIGNED, DENSE, SPARSE, Codec, bits_of, packed_bits, shared_bytes, unpacked_bits
from gia_bench.wire.aligned import MASK
from gia_bench.wire.sparse import Form, smallest_form

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
shapes = st.one_of(
    st.sampled_from([(), (0,), (1,), (1, 1), (3, 0, 2), (8,), (7, 9)]),
    st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Random bits (so NaN with payloads, infinities and subnormals too) with a random share of zeros."""
    shape, dtype = draw(shapes), draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    integer = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integer)
    density = draw(st.sampled_from([0.0, 0.02, 0.2, 0.9, 1.0]))
    tensor = (bits * (torch.rand(shape, generator=generator) < density)).view(dtype)
    for special in draw(st.lists(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf]), max_size=3)):
        if tensor.numel():
            tensor.reshape(-1)[draw(st.integers(0, tensor.numel() - 1))] = special
    return tensor


updates = st.dictionaries(st.sampled_from(list("edcba")), tensors(), max_size=5)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        integer = INTEGERS[tensor.element_size()]
        assert torch.equal(actual[name].contiguous().view(integer), tensor.contiguous().view(integer)), name


@pytest.mark.parametrize("codec", [DENSE, SPARSE], ids=["dense", "sparse"])
@settings(deadline=None, max_examples=150)
@given(update=updates)
def test_decoding_an_encoded_update_gives_every_bit_back(codec: Codec, update: dict[str, Tensor]) -> None:
    like = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    payload = codec.encode(update, {}, 3)
    assert payload.num_examples == 3
    assert_same_bits(codec.decode(payload, like, {}), like | update)


@settings(deadline=None, max_examples=150)
@given(update=updates, seed=st.integers(0, 1000))
def test_an_aligned_update_comes_back_bit_for_bit_and_costs_its_values_alone(
    update: dict[str, Tensor], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(t.shape, generator=generator) < 0.3 for name, t in update.items()}
    sent = {name: torch.where(masks[name], t, 0) for name, t in update.items()}
    shared = {MASK + name: mask for name, mask in masks.items()}
    payload = ALIGNED.encode(sent, shared, 1)
    assert payload.num_bytes == sum(int(masks[n].sum()) * t.element_size() for n, t in update.items())
    assert_same_bits(ALIGNED.decode(payload, update, shared), sent)


@settings(deadline=None, max_examples=100)
@given(update=updates)
def test_a_sparse_payload_is_never_larger_than_the_dense_one_and_its_header(update: dict[str, Tensor]) -> None:
    header = 8 * len(update)
    padding = 1
    assert SPARSE.encode(update, {}, 1).num_bytes <= DENSE.encode(update, {}, 1).num_bytes + header + padding


@pytest.mark.parametrize(
    ("entries", "nonzero", "form", "num_bytes"),
    [
        (1000, 3, Form.INDICES, 8 + 3 * 4 + 3 * 4),
        (1000, 200, Form.BITMAP, 8 + 125 + 200 * 4),
        (1000, 1000, Form.DENSE, 8 + 1000 * 4),
        (1000, 0, Form.INDICES, 8),
        (1001, 500, Form.BITMAP, 8 + 126 + 500 * 4),
        (1, 1, Form.DENSE, 8 + 4),
        (0, 0, Form.DENSE, 8),
    ],
)
def test_a_sparse_payload_has_the_size_counted_by_hand(entries: int, nonzero: int, form: Form, num_bytes: int) -> None:
    update = {"w": torch.zeros(entries)}
    update["w"][:nonzero] = 1.5
    payload = SPARSE.encode(update, {}, 1)
    assert smallest_form(entries, nonzero, 4) == form
    assert payload.tensors[0].tolist() == [[form, nonzero]]
    assert payload.num_bytes == num_bytes


def test_negative_zero_and_nan_payloads_are_sent_and_positive_zero_is_not() -> None:
    odd_nan = torch.tensor([0x7FC01234], dtype=torch.int32).view(torch.float32)
    update = {"w": torch.cat([torch.zeros(100), torch.tensor([-0.0]), odd_nan])}
    *_, values = SPARSE.encode(update, {}, 1).tensors
    assert values.view(torch.int32).tolist() == [-(2**31), 0x7FC01234]


def test_updates_of_several_dtypes_share_one_payload() -> None:
    update = {str(dtype): torch.tensor([0.0, 1.0, 0.0, -2.0] * 20, dtype=dtype) for dtype in FLOATS}
    payload = SPARSE.encode(update, {}, 1)
    assert {t.dtype for t in payload.tensors[3:]} == set(FLOATS)
    assert_same_bits(SPARSE.decode(payload, update, {}), update)


def test_several_tensors_of_every_form_share_one_payload() -> None:
    generator = torch.Generator().manual_seed(0)
    densities = {"a": 0.01, "b": 0.2, "c": 1.0, "d": 0.02, "e": 0.3, "f": 1.0, "g": 0.005}
    update = {
        name: torch.where(torch.rand(30, 33, generator=generator) < density, 1 + torch.rand(30, 33), 0)
        for name, density in densities.items()
    }
    payload = SPARSE.encode(update, {}, 1)
    expected = [Form.INDICES, Form.BITMAP, Form.DENSE, Form.INDICES, Form.BITMAP, Form.DENSE, Form.INDICES]
    assert payload.tensors[0][:, 0].tolist() == expected
    assert_same_bits(SPARSE.decode(payload, update, {}), update)


@pytest.mark.parametrize("codec", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_the_order_of_names_does_not_matter(codec: Codec) -> None:
    update = {"b": torch.tensor([0.0, 1.0]), "a": torch.tensor([2.0, 0.0])}
    like = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert_same_bits(codec.decode(codec.encode(update, {}, 1), like, {}), {"a": update["a"], "b": update["b"]})


def test_encoding_leaves_the_update_as_it_was() -> None:
    update = {"w": torch.tensor([[0.0, 1.0], [0.0, 2.0]]).T.requires_grad_()}
    before = update["w"].detach().clone()
    payload = SPARSE.encode(update, {}, 1)
    assert not payload.tensors[-1].requires_grad
    assert torch.equal(update["w"], before)


def test_values_off_the_announced_mask_are_refused_by_name() -> None:
    shared = {MASK + "a": torch.tensor([True, False]), MASK + "b": torch.tensor([True, False])}
    update = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, -0.0])}
    with pytest.raises(WireError, match=r"off the announced mask in \['b'\]"):
        ALIGNED.encode(update, shared, 1)


@pytest.mark.parametrize("mask", [None, torch.ones(3, dtype=torch.bool), torch.ones(2)])
def test_the_aligned_codec_asks_for_a_mask_of_the_parameters_shape(mask: Tensor | None) -> None:
    shared = {} if mask is None else {MASK + "a": mask}
    with pytest.raises(WireError, match=r"needs a bool mask of shape \[2\] for 'a'"):
        ALIGNED.encode({"a": torch.ones(2)}, shared, 1)


def test_a_payload_for_another_model_is_refused() -> None:
    payload = {"w": torch.ones(4)}
    shared = {MASK + "w": torch.tensor([True, False, False, False])}
    with pytest.raises(WireError, match="1 tensors"):
        DENSE.decode(DENSE.encode(payload, {}, 1), {}, {})
    with pytest.raises(WireError, match=r"for 'w', but the model has torch.float32 \[2, 2\]"):
        DENSE.decode(DENSE.encode(payload, {}, 1), {"w": torch.zeros(2, 2)}, {})
    with pytest.raises(WireError, match=r"float32.*float64"):
        SPARSE.decode(SPARSE.encode(payload, {}, 1), {"w": torch.zeros(4, dtype=torch.float64)}, {})
    with pytest.raises(WireError, match="4 values for 5 places"):
        SPARSE.decode(SPARSE.encode(payload, {}, 1), {"w": torch.zeros(5)}, {})
    sent = {"w": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    with pytest.raises(WireError, match="1 values for 4 places"):
        ALIGNED.decode(ALIGNED.encode(sent, shared, 1), sent, {MASK + "w": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(WireError, match=r"float32.*float64"):
        ALIGNED.decode(ALIGNED.encode(sent, shared, 1), {"w": torch.zeros(4, dtype=torch.float64)}, shared)


@given(bits=st.lists(st.booleans(), max_size=70))
def test_packed_bits_are_those_of_numpy_and_come_back(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = packed_bits(mask)
    assert packed.tolist() == np.packbits(np.array(bits, dtype=bool), bitorder="little").tolist()
    assert torch.equal(unpacked_bits(packed, len(bits)), mask)


def test_the_integer_view_tells_negative_zero_from_zero() -> None:
    for dtype in FLOATS:
        assert (bits_of(torch.tensor([0.0, -0.0, math.nan], dtype=dtype)) != 0).tolist() == [False, True, True]


def test_an_announced_mask_costs_one_bit_per_entry() -> None:
    shared = {"mask.w": torch.ones(3, 3, dtype=torch.bool), "mask.b": torch.ones(8, dtype=torch.bool)}
    assert shared_bytes(shared) == 2 + 1
    assert shared_bytes(shared | {"other": torch.zeros(5, dtype=torch.float64)}) == 3 + 40
    assert shared_bytes({}) == 0
