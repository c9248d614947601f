"""Bits of masks and compressed weights against numpy and a loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.pruning.adapters import masked_adapter_weight, merged
from act24.pruning.methods import masked
from act24.pruning.pattern import mask_by_row, parse_pattern
from act24.pruning.stored import compressed, expanded, fault, packed_bits, unpacked_bits


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 1))
def test_round_trip_bit_for_bit(rows, columns, seed, share):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < share
    bits = packed_bits(mask)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpacked_bits(bits, columns), mask)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = masked(torch.randn(rows, columns, generator=generator).to(dtype), mask)
        weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0  # zeros that stay are kept apart
        values, bits = compressed(weight, mask)
        back, back_mask = expanded(values, bits, columns)
        assert back.dtype is dtype
        assert torch.equal(
            back.view(torch.int16 if dtype.itemsize == 2 else torch.int32),
            weight.view(torch.int16 if dtype.itemsize == 2 else torch.int32),
        )
        assert torch.equal(back_mask, mask)


def test_two_of_four_in_sixteen_bits_is_nine_sixteenths():
    weight = drawn(64, 256).bfloat16()
    mask = mask_by_row(weight.abs().float(), parse_pattern("2:4"))
    values, bits = compressed(masked(weight, mask), mask)
    assert values.nbytes + bits.nbytes == weight.nbytes * 9 // 16


def test_bits_of_another_shape_are_refused():
    bits = packed_bits(torch.ones(3, 12, dtype=torch.bool))
    with pytest.raises(Act24Error, match="bits of a mask of 20 columns"):
        unpacked_bits(bits, 20)
    with pytest.raises(Act24Error, match="behind the 11"):
        unpacked_bits(bits, 11)
    with pytest.raises(Act24Error, match="5 values for 36"):
        expanded(torch.ones(5), bits, 12)


def test_faults_are_found():
    pattern = parse_pattern("2:4")
    weight = drawn(8, 16)
    mask = mask_by_row(weight.abs(), pattern)
    good = masked(weight, mask)
    assert fault(good, mask, pattern) == ""
    lost = good.clone()
    lost[~mask] = 1
    assert "64 weights that were pruned are not zero" in fault(lost, mask, pattern)
    assert "-0.0" in fault(weight * mask, mask, pattern)  # multiplying leaves it
    nan = good.clone()
    nan[mask] = torch.nan
    assert "not finite" in fault(nan, mask, pattern)
    assert "does not follow 2:4" in fault(good, mask.roll(1, 1), pattern) or "not zero" in fault(
        good, mask.roll(1, 1), pattern
    )
    assert "does not follow 1:4" in fault(good, mask, parse_pattern("1:4"))
    assert "its mask is" in fault(good, mask[:4], pattern)


def test_an_accidental_zero_stays_trainable():
    mask = torch.tensor([[True, True, False, False]])
    values, bits = compressed(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), mask)
    assert values.tolist() == [0.0, 1.0]
    assert expanded(values, bits, 4)[1].tolist() == mask.tolist()


def test_masked_adapters_merge_exactly():
    weight, a, b = drawn(8, 16), drawn(2, 16, seed=1), drawn(8, 2, seed=2)
    mask = mask_by_row(weight.abs(), parse_pattern("2:4"))
    weight = masked(weight, mask)
    trained = masked_adapter_weight(weight, a, b, packed_bits(mask), 2.0)
    torch.testing.assert_close(trained, weight + 2 * mask * (b @ a))
    one = merged(weight, a, b, 2.0, mask)
    torch.testing.assert_close(one, trained, rtol=1e-6, atol=1e-6)
    assert fault(one, mask, parse_pattern("2:4")) == ""
    assert (merged(weight, a, b, 2.0, None) != 0).all()  # a plain one fills the zeros
