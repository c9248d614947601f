"""The operator that packs 2:4 weights (`act24.sparse24.kernels.pack_weight`)."""

from __future__ import annotations

from torch import Tensor

from act24.sparse24.format.packed import Packed24, empty_packed, pack
from act24.sparse24.kernels.shared.registry import operator


def _pack_weight_reference(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return pack(weight, mask).buffer, pack(weight.T.contiguous(), mask.T.contiguous()).buffer


def _pack_weight_kernel(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from act24.sparse24.kernels.pack_weight import pack_weight

    packed, transposed = _pack_weight_fake(weight, mask)
    pack_weight(weight, mask, Packed24(packed), Packed24(transposed))
    return packed, transposed


def _pack_weight_fake(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    return empty_packed(rows, columns, weight), empty_packed(columns, rows, weight)


#: A weight `[O, I]` under a transposable 2:4 mask, packed as `[O, I]` and, transposed, as `[I, O]`.
pack_weight = operator(
    "pack_weight(Tensor weight, Tensor mask) -> (Tensor, Tensor)",
    _pack_weight_reference,
    _pack_weight_kernel,
    _pack_weight_fake,
)
