"""The packed 2:4 format against an independent decoder and the test vectors of its description."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from act24.sparse24.format.packed import (
    Packed24,
    metadata_field,
    metadata_field8,
    pack,
    packable,
    random_packed,
    unpack,
    with_values,
)
from act24.sparse24.pattern.selection import top2_of_4

SHAPES = st.tuples(st.integers(1, 3).map(lambda n: 64 * n), st.integers(1, 6).map(lambda n: 32 * n))
WIDE = st.tuples(st.integers(1, 3).map(lambda n: 64 * n), st.integers(1, 3).map(lambda n: 64 * n))
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])
E4M3 = torch.float8_e4m3fn
FEW = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])


def draw(shape: tuple[int, int], dtype: torch.dtype, seed: int, ties: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return FEW[torch.randint(len(FEW), shape, generator=generator)].to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def decode(packed: Packed24) -> Tensor:
    """A second reading of the layout, nibble by nibble, from the buffer alone: the closed form of
    FlagGems' `_cslt_sparse_mm` and xformers' `warp_tensor.h`, which both agree with cuSPARSELt."""
    rows, columns = packed.shape
    words = packed.buffer.flatten().view(torch.int16)
    values, metadata = words[: rows * columns // 2], words[rows * columns // 2 :].view(torch.uint8).tolist()
    dense = torch.zeros(rows, columns, dtype=torch.int16)
    for row in range(rows):
        for column in range(0, columns, 4):
            byte = (row // 64) * 8 * columns + (column // 32) * 256 + ((row % 64) // 16) * 64
            byte += (row % 8) * 8 + ((column % 16) // 4) * 2 + (column % 32) // 16
            nibble = metadata[byte] >> (4 if row % 16 >= 8 else 0) & 15
            low, high = nibble & 3, nibble >> 2
            assert low < high
            place = row * columns // 2 + column // 2
            dense[row, column + low], dense[row, column + high] = values[place], values[place + 1]
    return dense.view(packed.buffer.dtype)


def decode8(packed: Packed24) -> Tensor:
    """The same for 8-bit values, as the positions of bits: from the least, a byte of metadata is column bit 2
    (which half of it), then row bit 3, column bits 5, 3 and 4, row bits 0 to 2, 4 and 5, and the tiles."""
    rows, columns = packed.shape
    content = packed.buffer.flatten().view(torch.uint8)
    values, metadata = content[: rows * columns // 2], content[rows * columns // 2 :].tolist()
    dense = torch.zeros(rows, columns, dtype=torch.uint8)
    for row in range(rows):
        for column in range(0, columns, 4):
            places = ((row, 3), (column, 5), (column, 3), (column, 4), *((row, n) for n in (0, 1, 2, 4, 5)))
            byte = sum((number >> bit & 1) << n for n, (number, bit) in enumerate(places))
            byte += (row // 64 * (columns // 64) + column // 64) * 512
            nibble = metadata[byte] >> column % 8 & 15
            low, high = nibble & 3, nibble >> 2
            assert low < high
            place = row * columns // 2 + column // 2
            dense[row, column + low], dense[row, column + high] = values[place], values[place + 1]
    return dense.view(packed.buffer.dtype)


@settings(max_examples=12)
@given(SHAPES, DTYPES, st.integers(0, 99), st.booleans())
def test_every_shape_packs_the_two_largest(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, ties: bool
) -> None:
    dense = draw(shape, dtype, seed, ties)
    packed = pack(dense)
    expected = torch.where(top2_of_4(dense.abs()), dense, 0)
    assert packed.shape == shape
    assert torch.equal(unpack(packed), expected)
    assert torch.equal(decode(packed), expected)


@settings(max_examples=12)
@given(WIDE, st.integers(0, 99), st.booleans())
def test_so_it_is_with_8_bits(shape: tuple[int, int], seed: int, ties: bool) -> None:
    dense = draw(shape, E4M3, seed, ties)
    packed = pack(dense)
    expected = torch.where(top2_of_4(dense.float().abs()), dense.float(), 0)
    assert (packed.shape, packed.buffer.shape[1]) == (shape, shape[1] * 10 // 16)
    assert torch.equal(unpack(packed).float(), expected)
    assert torch.equal(decode8(packed).float(), expected)


@settings(max_examples=12)
@given(WIDE, st.integers(0, 99), st.sampled_from([torch.bfloat16, E4M3]))
def test_other_values_stay_at_their_places(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    """From 8 to 16 bits and back it is the same buffer, whatever groups with zeros name."""
    packed = pack(draw(shape, dtype, seed, True))
    other = torch.bfloat16 if dtype is E4M3 else E4M3
    there = with_values(packed, packed.values.to(other))
    back = with_values(there, packed.values)
    assert torch.equal(unpack(there).float(), unpack(packed).float())
    assert torch.equal(back.buffer.view(torch.uint8), packed.buffer.view(torch.uint8))


@settings(max_examples=25)
@given(SHAPES, st.integers(0, 99), st.integers(0, 2))
def test_any_2_4_matrix_comes_back(shape: tuple[int, int], seed: int, most: int) -> None:
    """Groups with two, one or no entry, in any places."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(*shape, generator=generator).unflatten(-1, (-1, 4)).argsort(-1)
    number = torch.randint(most + 1, order.shape[:-1], generator=generator)
    mask = (order < number[..., None]).flatten(-2)
    dense = draw(shape, torch.bfloat16, seed, False)
    assert torch.equal(unpack(pack(dense, mask)), torch.where(mask, dense, 0))


@pytest.mark.parametrize("columns", [32, 64, 224])
def test_every_group_has_a_field_of_its_own(columns: int) -> None:
    row, column = torch.arange(128)[:, None], torch.arange(0, columns, 4)[None]
    for field in (metadata_field, metadata_field8)[: 1 if columns % 64 else 2]:
        fields = field(row, column, columns)
        assert sorted(fields.flatten().tolist()) == list(range(128 * columns // 4))


@pytest.mark.parametrize(
    ("row", "column", "byte", "high"),
    [
        (0, 0, 0, 0),
        (8, 0, 0, 1),
        (1, 0, 8, 0),
        (16, 0, 64, 0),
        (0, 4, 2, 0),
        (0, 16, 1, 0),
        (0, 32, 256, 0),
        (24, 20, 67, 1),
        (64, 0, 512, 0),
    ],
)
def test_places_of_fields(row: int, column: int, byte: int, high: int) -> None:
    """Test vectors for 64 columns."""
    assert divmod(metadata_field(row, column, 64), 2) == (byte, high)


def test_a_field_names_two_ascending_places_even_where_nothing_is_kept() -> None:
    packed = pack(torch.zeros(64, 32).bfloat16())
    assert {nibble for byte in packed.metadata.tolist() for nibble in (byte & 15, byte >> 4)} == {0 | 1 << 2}


def test_nan_and_infinity_stay_in() -> None:
    dense = torch.zeros(64, 32).bfloat16()
    dense[0, :4] = torch.tensor([float("inf"), 3.0, 4.0, float("nan")])
    dense[1, :4] = torch.tensor([float("nan"), float("nan"), float("inf"), 1.0])
    result = unpack(pack(dense))
    assert result[0, 0] == float("inf")
    assert result[0, 3].isnan()
    assert result[1, :2].isnan().all()


def test_entries_outside_the_mask_are_stored_as_positive_zero() -> None:
    packed = pack(torch.full((64, 32), -1.0).bfloat16(), torch.zeros(64, 32, dtype=torch.bool))
    assert not packed.values.view(torch.int16).any()


def test_random_matrices_are_in_the_format() -> None:
    packed = random_packed(64, 96, torch.bfloat16, torch.Generator().manual_seed(1))
    dense = decode(packed)
    assert torch.equal(unpack(packed), dense)
    assert ((dense != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (96, 64), (0, 32), (64, 0)])
def test_other_shapes_are_refused(shape: tuple[int, int]) -> None:
    assert not packable(*shape)
    with pytest.raises(ValueError, match=r"rows a multiple of 64 and columns of 32"):
        pack(torch.zeros(shape).bfloat16())
    with pytest.raises(ValueError, match=r"8-bit, with columns of 64"):
        pack(torch.zeros(64, 32).to(E4M3))


def test_other_dtypes_and_full_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="16-bit"):
        pack(torch.zeros(64, 32))
    with pytest.raises(ValueError, match="more than two"):
        pack(torch.zeros(64, 32).bfloat16(), torch.ones(64, 32, dtype=torch.bool))
