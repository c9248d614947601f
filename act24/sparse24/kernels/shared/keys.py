"""What the kernels have in common: keys, two of four, metadata.

Integer instructions, not memory, limit the packing kernels: at the speed of a copy there is time for about 10
of them an element. So the functions here are written to need few. A *key* is the 32-bit pattern of a 16-bit
float in the upper half, with 3 - position in the two lowest bits: keys of a group are all different, sort by
value and then by lower position, carry value and position through `min` and `max` without a branch, and turn
into metadata with one multiply-add. Bit patterns sort like the floats where signs are equal; where they are
not, negative ones come last, as relu wants it. NaN sorts above infinity, so it stays in and is seen; one with
its sign bit set sorts as negative, but no product on these GPUs makes such.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from act24.compiler import jit, jit_arithmetic, tl
from act24.sparse24.format import packed

metadata_field = jit_arithmetic(packed.metadata_field)


@jit
def as_float(bits):
    """The float with this bit pattern."""
    return bits.to(tl.float32, bitcast=True)


@jit
def as_bits(value):
    """The bit pattern of a 32-bit value."""
    return value.to(tl.uint32, bitcast=True)


@jit
def as_signed(bits):
    """The same bits as an int32, which is how PyTorch holds them."""
    return bits.to(tl.int32, bitcast=True)


@jit
def load_bits(pointer, mask=None):
    """Two 16-bit values in one word, the even column in the lower half."""
    return as_bits(tl.load(pointer, mask=mask))


@jit
def upper(bits):
    """The upper half of a word, as a float's bit pattern: of two columns the odd one, of a key its value."""
    return bits & 0xFFFF0000


@jit
def signed_keys(even, odd):
    """Keys, as int32, of the four columns of every group, from its two words."""
    return (
        as_signed(even << 16 | 3),
        as_signed(upper(even) | 2),
        as_signed(odd << 16 | 1),
        as_signed(upper(odd)),
    )


@jit
def sort4(key0, key1, key2, key3):
    """Four keys in descending order."""
    high01 = tl.maximum(key0, key1)
    low01 = tl.minimum(key0, key1)
    high23 = tl.maximum(key2, key3)
    low23 = tl.minimum(key2, key3)
    middle_high = tl.minimum(high01, high23)
    middle_low = tl.maximum(low01, low23)
    return (
        tl.maximum(high01, high23),
        tl.maximum(middle_high, middle_low),
        tl.minimum(middle_high, middle_low),
        tl.minimum(low01, low23),
    )


@jit
def by_position(larger, smaller):
    """Two keys, the one with the lower position first."""
    swap = (larger << 30) < (smaller << 30)
    return tl.where(swap, smaller, larger), tl.where(swap, larger, smaller)


@jit
def complement_field(first, second):
    """The metadata of two keys in order, in the four lowest bits and inverted; bits 4 to 15 are zero."""
    return first + second * 4


@jit
def spread(low, high, first, second, code: tl.constexpr):
    """The two entries of a packed group at their places among four, as keys."""
    zero = first & 0
    return (
        tl.where(low == 0, first, zero) | code,
        tl.where(low == 1, first, tl.where(high == 4, second, zero)) | code,
        tl.where(low == 2, first, tl.where(high == 8, second, zero)) | code,
        tl.where(high == 12, second, zero) | code,
    )


@jit
def filled(low, high, first, second):
    """The two entries of every packed group, words with the value in their upper half, at their places among
    zeros: words of two columns, int32 [rows, 2 · groups]."""
    x0, x1, x2, x3 = spread(low, high, first, second, 0)
    words = tl.join(x0 >> 16 | x1, x2 >> 16 | x3)
    return as_signed(tl.reshape(words, [low.shape[0], low.shape[1] * 2]))


@jit
def group_bytes(bytes_of_groups):
    """Bring together what one word of metadata holds.

    Args:
        bytes_of_groups: uint8 [rows, groups], rows a multiple of 16 and groups of 8.

    Returns:
        two uint32 [groups / 8, rows / 16, 8, 2], in the order of the words in memory for each 64 rows and all
        groups: the bytes of rows r and r + 8 and of groups g and g + 4 (16 columns); the second one of
        groups g + 1 and g + 5.
    """
    rows: tl.constexpr = bytes_of_groups.shape[0]
    groups: tl.constexpr = bytes_of_groups.shape[1]
    # A row is (16s, upper 8 of 16, 8s), a group (8s, upper 4 of 8, upper 2 of 4, odd).
    x = tl.reshape(bytes_of_groups, [rows // 16, 2, 8, groups // 8, 2, 2, 2])
    row, row_8 = tl.split(tl.permute(x, (3, 0, 2, 5, 6, 4, 1)))
    row_near, row_far = tl.split(row)
    row_8_near, row_8_far = tl.split(row_8)
    byte0, byte4 = tl.split(row_near)
    byte1, byte5 = tl.split(row_8_near)
    byte2, byte6 = tl.split(row_far)
    byte3, byte7 = tl.split(row_8_far)
    return _word_of(byte0, byte1, byte2, byte3), _word_of(byte4, byte5, byte6, byte7)


@jit
def _word_of(byte0, byte1, byte2, byte3):
    low = byte0.to(tl.uint32) | byte1.to(tl.uint32) << 8
    return low | byte2.to(tl.uint32) << 16 | byte3.to(tl.uint32) << 24


@jit
def metadata_words(even, odd):
    """Words of metadata from the two results of `group_bytes`, whose bytes hold inverted fields in their low
    bits."""
    return (_halves(even) | _halves(odd) << 16) ^ 0xFFFFFFFF


@jit
def _halves(bytes4):
    """The low four bits of each byte of a word, next to each other in its lower half."""
    fields = bytes4 & 0x0F0F0F0F
    fields = fields | fields >> 4
    return (fields & 0xFF) | (fields >> 8 & 0xFF00)


@jit
def round16(value, dtype: tl.constexpr):
    """A float32 rounded to the 16-bit dtype, as float32."""
    return value.to(dtype).to(tl.float32)


@jit
def one_if_positive(value):
    """1.0 where a float is above zero, else 0.0, on the multiplier: it becomes one instruction that clamps
    its result, and leaves the integer units alone."""
    return tl.minimum(tl.maximum(value * 1.7014118346046923e38, 0.0), 1.0)
