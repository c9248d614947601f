"""The operators of the 2:4 operations, one file each: the Triton kernel, the reference in plain PyTorch, the
shapes for tracing, and the launcher, from whose annotations the schema is read. `shared` has what several
use.

pack_activation, count_activation, pack_gradient, unpack_gradient, activation_gradient: the elementwise passes
  of a 2:4 feed-forward network.
product24: the product with a 2:4 matrix. gather_features: single features of one, for statistics.
largest_magnitudes, cast_e4m3: a matrix in e4m3, as it lies and transposed. product_e4m3: the dense product.
pack_gradient_e4m3, product24_e4m3: of the feed-forward network in e4m3.
linear_pack, linear_gradient, recompute_gradient: products with the 2:4 activation in them, for narrow
linears.
token_order: the order in which tokens are grouped.
pack_weight, pack_weight_rows: a 2:4 weight, and its transpose, from one read. best_transposable_mask: its
    mask.
skipping_product: an activation times a weight by the rows of active features; packed_decode: a packed 2:4
    weight times up to 16 tokens; dense_decode: a dense weight times one token. All for decoding, where bytes
    are the time.
pack_drawn: the output gradient of a linear, drawn 2:4 along the tokens.
"""

# Operators are found by name, so that all are there as soon as one of them can be asked for.
from act24.sparse24.kernels import (  # noqa: F401
    activation_gradient,
    cast_e4m3,
    count_activation,
    dense_decode,
    gather_features,
    largest_magnitudes,
    linear_gradient,
    linear_pack,
    pack_activation,
    pack_drawn,
    pack_gradient,
    pack_gradient_e4m3,
    pack_weight,
    packed_decode,
    product24,
    product24_e4m3,
    product_e4m3,
    recompute_gradient,
    skipping_product,
    token_order,
    transposable_mask,
    unpack_gradient,
)
