"""What the kernels have in common: keys, two of four, metadata.

The packing kernels are bound by integer instructions long before memory (a budget of about 10 of them an
element at the speed of a copy), so everything here is counted. A *key* is the 32-bit pattern of a 16-bit
float in the upper half, with 3 - position in the two lowest bits: keys of a group are all different, sort by
value and then by lower position, carry value and position through `min` and `max` without a branch, and turn
into metadata with one multiply-add. Bit patterns sort like the floats where signs are equal; where they are
not, negative ones come last, as relu wants it. NaN sorts above infinity, so it stays in and is seen; one with
its sign bit set sorts as negative, but no product on these GPUs makes such.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from act24.kernels.compiler import jit, jit_arithmetic, tl
from act24.sparse24 import packed

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
def round16(value, dtype: tl.constexpr):
    """A float32 rounded to the 16-bit dtype, as float32."""
    return value.to(dtype).to(tl.float32)


@jit
def one_if_positive(value):
    """1.0 where a float is above zero, else 0.0, on the multiplier: it becomes one instruction that clamps
    its result, and leaves the integer units alone."""
    return tl.minimum(tl.maximum(value * 1.7014118346046923e38, 0.0), 1.0)
