"""What a device lacks, with the library played by a few lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from act24.sparse24.format import cusparselt, device
from act24.sparse24.format.multiply import multiply24
from act24.sparse24.format.packed import Packed24, pack, unpack


def test_a_cpu_says_why_it_has_no_packed_products() -> None:
    assert "CUDA" in device.obstacle(torch.device("cpu"))
    assert "CUDA" in device.fp8_obstacle(torch.device("cpu"))


def test_products_look_at_nothing_that_a_check_has_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking waits for the device, which breaks the capture of a graph: the cache has to have it by then."""
    asked = []
    monkeypatch.setattr(cusparselt, "multiplies", lambda _, *key: asked.append(key) or True)
    monkeypatch.setattr(cusparselt, "multiply", lambda *_: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(device, "layout_error", lambda *_: 0.0)
    gpu = torch.device("cuda", 0)
    assert device.obstacle.__wrapped__(gpu) == ""
    monkeypatch.setattr(device, "obstacle", lambda _: "")
    assert device.fp8_obstacle.__wrapped__(gpu) == ""
    looked_at = set(asked)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        multiply24(pack(torch.randn(64, 64).to(dtype)).buffer, torch.randn(8, 64).to(dtype).T, 0, False)
    assert set(asked[-2:]) == looked_at


def test_memory_that_runs_out_is_raised_and_not_kept_as_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(device, "layout_error", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        device.obstacle.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(device, "obstacle", lambda _: "")
    with pytest.raises(torch.OutOfMemoryError):
        device.fp8_obstacle.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(torch.ops.aten, "_cslt_compress", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        cusparselt.multiplies.__wrapped__(torch.device("cpu"), torch.bfloat16)


def flipped(buffer: Tensor) -> Tensor:
    return buffer.view(torch.uint8).flip(-1).view(buffer.dtype)


@pytest.mark.parametrize("said", ["", "another layout of e4m3", "does not multiply e4m3"])
def test_the_8_bit_layout_is_told_from_a_product(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """With a library that has our layout, one that has another, and one without e4m3."""
    own = flipped if said == "another layout of e4m3" else lambda buffer: buffer

    def compress(dense: Tensor) -> Tensor:
        return own(pack(dense, dense.float() != 0).buffer).flatten()

    def multiply(packed: Tensor, dense: Tensor) -> Tensor:
        if said == "does not multiply e4m3":
            raise RuntimeError("not supported")
        return unpack(Packed24(own(packed))).bfloat16() @ dense.bfloat16()

    monkeypatch.setattr(torch.ops.aten, "_cslt_compress", compress)
    monkeypatch.setattr(device, "library_product", multiply)
    monkeypatch.setattr(device, "obstacle", lambda _: "")
    reason = device.fp8_obstacle.__wrapped__(torch.device("cpu"))
    assert (said in reason) if said else not reason
