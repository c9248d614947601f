"""e4m3 by rows, against a rounding made from its definition, and `activation24` with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from act24.errors import Act24Error
from act24.sparse24.feed_forward import operation as activation
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.format.device import why_no_fp8
from act24.sparse24.format.fp8 import linear_fp8, quantise_rows

FP8 = Options24(precision="fp8")


def every_e4m3() -> Tensor:
    """All numbers of the format, made from their bits: a sign, four bits of exponent over 7, three of
    fraction; exponent 0 has no leading one, and the largest pattern is NaN."""
    bits = torch.arange(127)
    exponent, fraction = (bits >> 3).double(), (bits & 7).double()
    normal, small = 2 ** (exponent - 7) * (1 + fraction / 8), 2.0**-6 * fraction / 8
    positive = torch.where(exponent > 0, normal, small)
    return torch.cat((-positive.flip(0), positive))


@given(st.integers(0, 2**31), st.floats(-25, 25))
def test_each_entry_is_the_nearest_number_of_the_format(seed: int, exponent: float) -> None:
    """Over a scale that brings the largest of the row to 448; a tie may go to either side."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 40, generator=generator) * torch.rand(3, 40, generator=generator) ** 8
    rows *= 10.0**exponent
    narrow, scale = quantise_rows(rows)
    wanted = rows.double() * (448 / rows.double().abs().amax(1, keepdim=True))
    distance = (wanted[..., None] - every_e4m3()).abs().amin(-1)
    torch.testing.assert_close((wanted - narrow.double()).abs(), distance, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scale.double() * 448, rows.double().abs().amax(1), rtol=1e-6, atol=0)
    assert (narrow.double().abs().amax(1) == 448).all()


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen() -> None:
    rows = torch.ones(3, 8)
    rows[0], rows[1, 2], rows[2, 2] = 0, float("nan"), float("inf")
    narrow, scale = quantise_rows(rows)
    assert not narrow[0].float().any()
    assert 0 < scale[0] < 1e-30
    assert narrow[1:].isnan().all()  # as `cast_e4m3` has such rows
    assert scale[1:].isnan().all()
    y = linear_fp8(rows, torch.ones(4, 8))
    assert not y[0].any()
    assert y[1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_the_quantised_rows(dtype: torch.dtype) -> None:
    """Integers up to 14 are in the format, and 14 comes to 448 by a power of two: nothing is rounded."""
    x, weight = torch.randint(-14, 15, (2, 5, 16)).to(dtype), torch.randint(-14, 15, (6, 16)).to(dtype) / 64
    x[..., 0], weight[:, 0] = 14, 14 / 64
    x[1] /= 2**9
    expected = (x.double() @ weight.double().T).to(dtype)
    assert torch.equal(linear_fp8(x, weight), expected)


def test_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for capability, word in (((8, 0), "capability 8.0"), ((8, 9), ""), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        reason = why_no_fp8(gpu)
        assert (word in reason) if word else not reason
    monkeypatch.setattr(activation, "why_no_fp8", lambda _: "this GPU has none")
    with pytest.raises(Act24Error, match="has none"):
        activation24(torch.randn(4, 8), None, None, torch.randn(4, 8), None, options=FP8)
    activation24(torch.randn(4, 8), None, None, None, None, options=FP8)  # there is no product
    activation24(torch.randn(4, 8), None, None, torch.randn(4, 8), None)


def test_half_precision_does_not_overflow() -> None:
    x, weight = torch.rand(3, 64).half(), torch.rand(5, 64).half()
    torch.testing.assert_close(linear_fp8(x, weight), F.linear(x, weight), rtol=0.05, atol=0.05)
