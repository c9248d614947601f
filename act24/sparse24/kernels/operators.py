"""The operators of 2:4 activations: packing on either way. For every one its reference, the kernel, and the
shapes; matrices in packed form are passed as their buffer (`act24.sparse24.format.packed`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format.packed import Packed24, empty_packed, pack, unpack, with_values
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.token_wise import Function, Method, Options24, Sparse24, sparsify_token_wise


def _pack_activation_reference(
    hidden: Tensor,
    seed: Tensor | None,
    real: Tensor | None,
    function: Function,
    method: Method,
    slope: bool,
    dense: bool,
    counts: bool,
    statistics: bool,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positive = torch.relu(hidden)
    by_token = positive if order is None else positive[torch.argsort(order)]
    sparse = sparsify_token_wise(by_token, seed, Options24(function=function, method=method))
    sparse = sparse if order is None else Sparse24(*(part[order] for part in sparse))
    packed = pack(sparse.value, sparse.mask)
    number, sums = _counts(positive, sparse, real)
    return (
        sparse.value if dense else packed.buffer,
        pack(sparse.slope, sparse.mask).values.clone() if slope else hidden.new_empty(0),
        number if counts else number[:0].clone(),
        sums if statistics else sums[:0].clone(),
    )


def _counts(positive: Tensor, sparse: Sparse24, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Non-zeros before 2:4 by feature, int32 `[F]`, and float32 `[4]`: see `pack_activation`."""
    nonzero = positive > 0 if real is None else (positive > 0) & real[:, None]
    energy = torch.where(nonzero, sparse.dense.float().square(), 0)
    sums = (
        (nonzero.unflatten(-1, (-1, 4)).sum(-1) > 2).sum(),
        (nonzero & ~sparse.mask).sum(),
        energy.sum(),
        torch.where(sparse.mask, 0, energy).sum(),
    )
    return nonzero.sum(0, dtype=torch.int32), torch.stack([s.float() for s in sums])


def _pack_activation_kernel(
    hidden: Tensor,
    seed: Tensor | None,
    real: Tensor | None,
    function: Function,
    method: Method,
    slope: bool,
    dense: bool,
    counts: bool,
    statistics: bool,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from act24.sparse24.kernels.pack_activation import pack_activation

    _, features = hidden.shape
    result, slopes, _, sums = _pack_activation_fake(
        hidden, seed, real, function, method, slope, dense, counts, statistics
    )
    number = hidden.new_zeros(features if counts or statistics else 0, dtype=torch.int32)
    made = pack_activation(
        hidden,
        result if dense else Packed24(result),
        slopes if slope else None,
        number if counts or statistics else None,
        statistics,
        seed,
        real,
        function,
        method,
        order,
    )
    return result, slopes, number if counts else number[:0].clone(), sums if made is None else made


def _pack_activation_fake(
    hidden: Tensor,
    seed: Tensor | None,
    real: Tensor | None,
    function: Function,
    method: Method,
    slope: bool,
    dense: bool,
    counts: bool,
    statistics: bool,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, features = hidden.shape
    return (
        torch.empty_like(hidden) if dense else empty_packed(tokens, features, hidden),
        hidden.new_empty(tokens, features // 2) if slope else hidden.new_empty(0),
        hidden.new_empty(features if counts else 0, dtype=torch.int32),
        hidden.new_empty(4 if statistics else 0, dtype=torch.float32),
    )


#: Activation, selection and packing along the features, for `hidden` bfloat16 `[T, F]`.
#: Returns: the activation, packed, or if `dense` with its zeros, `[T, F]`; its slope at the kept places
#: `[T, F/2]`, if asked for; non-zeros before 2:4 by feature, int32 `[F]`, if asked for; and if asked for
#: float32 `[4]`: groups with more than two non-zeros, non-zeros dropped, energy, energy dropped. Tokens that
#: are not `real` count nowhere. Row r is token `order[r]`, which is what mvue draws by; None: token r.
pack_activation = operator(
    "pack_activation(Tensor hidden, Tensor? seed, Tensor? real, str function, str method, bool slope, "
    "bool dense, bool counts, bool statistics, Tensor? order=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _pack_activation_reference,
    _pack_activation_kernel,
    _pack_activation_fake,
)


def _count_activation_reference(
    hidden: Tensor, real: Tensor | None, function: Function
) -> tuple[Tensor, Tensor]:
    positive = torch.relu(hidden)
    return _counts(positive, sparsify_token_wise(positive, None, Options24(function=function)), real)


def _count_activation_kernel(
    hidden: Tensor, real: Tensor | None, function: Function
) -> tuple[Tensor, Tensor]:
    from act24.sparse24.kernels.pack_activation import pack_activation

    counts = hidden.new_zeros(hidden.shape[1], dtype=torch.int32)
    sums = pack_activation(hidden, None, None, counts, True, None, real, function, "naive")
    assert sums is not None
    return counts, sums


def _count_activation_fake(hidden: Tensor, real: Tensor | None, function: Function) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape[1], dtype=torch.int32), hidden.new_empty(4, dtype=torch.float32)


#: The last two results of `pack_activation` alone, under naive 2:4.
count_activation = operator(
    "count_activation(Tensor hidden, Tensor? real, str function) -> (Tensor, Tensor)",
    _count_activation_reference,
    _count_activation_kernel,
    _count_activation_fake,
)


def _slope(saved: Packed24, slope: Tensor | None, function: Function) -> Tensor:
    """d activation / d hidden at the places of `saved.values`."""
    if slope is not None:
        return slope
    if function == "relu":
        return (saved.values > 0).to(saved.values.dtype)
    return 2 * saved.values.float().sqrt().to(saved.values.dtype)  # the exact relu(h): see the kernel


def _masked_gradient(grad: Tensor, saved: Packed24, slope: Tensor | None, function: Function) -> Packed24:
    """slope ∘ grad under the mask of `saved`."""
    kept = unpack(with_values(saved, torch.ones_like(saved.values))) != 0
    return with_values(saved, pack(grad, kept).values * _slope(saved, slope, function))


def _pack_gradient_reference(
    grad: Tensor,
    saved: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    function: Function,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    value = Packed24(saved)
    masked = _masked_gradient(grad, value, slope, function)
    rows = []
    for matrix in (unpack(value), unpack(masked)):
        matrix = matrix if real is None else torch.where(real[:, None], matrix, 0)
        rows.append(matrix.T.contiguous())
    chosen = grad.new_empty(0, dtype=torch.int64) if index is None else index
    return masked.buffer, pack(rows[0]).buffer, pack(rows[1]).buffer, rows[0][chosen], rows[1][chosen]


def _pack_gradient_kernel(
    grad: Tensor,
    saved: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    function: Function,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from act24.sparse24.kernels.pack_gradient import pack_gradient

    outputs = _pack_gradient_fake(grad, saved, slope, real, index, function)
    masked, value_rows, grad_rows = map(Packed24, outputs[:3])
    places = None
    if index is not None:
        places = torch.full((grad.shape[1],), -1, dtype=torch.int32, device=grad.device)
        places[index] = torch.arange(len(index), dtype=torch.int32, device=grad.device)
    arguments = (grad, Packed24(saved), slope, real, places)
    pack_gradient(*arguments, masked, value_rows, grad_rows, outputs[3], outputs[4], function)
    return outputs


def _pack_gradient_fake(
    grad: Tensor,
    saved: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    function: Function,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, features = grad.shape
    dense = (0 if index is None else index.shape[0], tokens)
    return (
        torch.empty_like(saved),
        empty_packed(features, tokens, grad),
        empty_packed(features, tokens, grad),
        grad.new_empty(dense),
        grad.new_empty(dense),
    )


#: From dS `[T, F]` and what forward saved to the operands of backward: dZ packed along the features `[T, F]`;
#: the activation and dZ packed along the tokens `[F, T]`, the two largest magnitudes of every four tokens,
#: tokens that are not `real` as zeros; and both as they are, `[n, T]`, in the features `index` `[n]`. `slope`
#: None: made from the activation.
pack_gradient = operator(
    "pack_gradient(Tensor grad, Tensor saved, Tensor? slope, Tensor? real, Tensor? index, "
    "str function) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pack_gradient_reference,
    _pack_gradient_kernel,
    _pack_gradient_fake,
)


def _unpack_gradient_reference(
    grad: Tensor, saved: Tensor, slope: Tensor | None, function: Function
) -> tuple[Tensor, Tensor, Tensor]:
    masked = _masked_gradient(grad, Packed24(saved), slope, function)
    return masked.buffer, unpack(Packed24(saved)), unpack(masked)


def _unpack_gradient_kernel(
    grad: Tensor, saved: Tensor, slope: Tensor | None, function: Function
) -> tuple[Tensor, Tensor, Tensor]:
    from act24.sparse24.kernels.unpack_gradient import unpack_gradient

    packed, value, dense = _unpack_gradient_fake(grad, saved, slope, function)
    unpack_gradient(grad, Packed24(saved), slope, Packed24(packed), value, dense, function)
    return packed, value, dense


def _unpack_gradient_fake(
    grad: Tensor, saved: Tensor, slope: Tensor | None, function: Function
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(saved), torch.empty_like(grad), torch.empty_like(grad)


#: From dS `[T, F]` and what forward saved: dZ packed along the features, and the activation and dZ with their
#: zeros filled in, `[T, F]`, for exact weight gradients.
unpack_gradient = operator(
    "unpack_gradient(Tensor grad, Tensor saved, Tensor? slope, str function) -> (Tensor, Tensor, Tensor)",
    _unpack_gradient_reference,
    _unpack_gradient_kernel,
    _unpack_gradient_fake,
)


def _activation_gradient_reference(grad: Tensor, value: Tensor, function: Function) -> Tensor:
    if function == "relu":
        return torch.where(value != 0, grad, 0)
    return grad * (2 * value.float().sqrt().to(value.dtype))


def _activation_gradient_kernel(grad: Tensor, value: Tensor, function: Function) -> Tensor:
    from act24.sparse24.kernels.activation_gradient import activation_gradient

    result = torch.empty_like(grad)
    activation_gradient(grad, value, result, function)
    return result


def _activation_gradient_fake(grad: Tensor, value: Tensor, function: Function) -> Tensor:
    return torch.empty_like(grad)


#: dZ `[T, F]` from dS and the activation with its zeros.
activation_gradient = operator(
    "activation_gradient(Tensor grad, Tensor value, str function) -> Tensor",
    _activation_gradient_reference,
    _activation_gradient_kernel,
    _activation_gradient_fake,
)


def _gather_features_reference(packed: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
    matrix = unpack(Packed24(packed))[:, index]
    matrix = matrix if real is None else torch.where(real[:, None], matrix, 0)
    return matrix.T.contiguous()


def _gather_features_kernel(packed: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
    from act24.sparse24.kernels.gather_features import gather_features

    rows = _gather_features_fake(packed, index, real)
    gather_features(Packed24(packed), index, real, rows)
    return rows


def _gather_features_fake(packed: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
    return packed.new_empty(index.shape[0], packed.shape[0])


#: The features `index` `[n]` of a matrix `[T, F]` packed along the features, each as a row `[n, T]` along the
#: tokens, tokens that are not `real` as zeros.
gather_features = operator(
    "gather_features(Tensor packed, Tensor index, Tensor? real) -> Tensor",
    _gather_features_reference,
    _gather_features_kernel,
    _gather_features_fake,
)
