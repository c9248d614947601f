"""Attention within documents, against each document alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from act24.document_attention import document_attention, seen
from act24.errors import Act24Error


def starts_of(*rows):
    """int32 `[B, S]`, from the lengths of the documents of each row."""
    return torch.tensor(
        [[begin for i, n in enumerate(lengths) for begin in [sum(lengths[:i])] * n] for lengths in rows],
        dtype=torch.int32,
    )


def drawn(heads, key_heads, rows=2, length=12, width=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, h, length, width, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


@pytest.mark.parametrize("key_heads", [4, 2])
def test_it_is_each_document_alone(key_heads):
    """Output and gradients, in float64: plain causal attention over each document's slice."""
    rows = ([12], [1, 4, 7]), ([3, 9], [1] * 12)
    for lengths in rows:
        query, key, value = inputs = drawn(4, key_heads)
        ours = document_attention(query, key, value, starts_of(*lengths), key_heads != 4)
        theirs = torch.zeros_like(ours)
        for row, documents in enumerate(lengths):
            begin = 0
            for length in documents:
                part = (slice(row, row + 1), slice(None), slice(begin, begin + length))
                alone = [t[part].repeat_interleave(4 // t.shape[1], 1) for t in inputs]
                theirs[part] = F.scaled_dot_product_attention(*alone, is_causal=True)
                begin += length
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
        for a, b in zip(*(torch.autograd.grad(y, inputs, probe) for y in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_without_beginnings_a_row_is_one_document():
    query, key, value = drawn(4, 4)
    ours = document_attention(query, key, value, torch.zeros((), dtype=torch.int32))
    assert torch.equal(ours, F.scaled_dot_product_attention(query, key, value, is_causal=True))


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_seen_is_the_same_document_and_not_behind(rows):
    length = min(map(sum, rows))
    found = seen(torch.stack([starts_of(lengths)[0, :length] for lengths in rows])).tolist()
    for lengths, row in zip(rows, found, strict=True):
        document = [number for number, size in enumerate(lengths) for _ in range(size)]
        for query, keys in enumerate(row):
            expected = [key <= query and document[key] == document[query] for key in range(length)]
            assert keys == expected


def test_beginnings_of_other_rows_are_refused():
    query, key, value = drawn(4, 4)
    with pytest.raises(Act24Error, match=r"beginnings are of rows \(2, 11\), and these are \(2, 12\)"):
        document_attention(query, key, value, starts_of([11], [11]))


def test_under_autocast_it_computes_as_scaled_dot_product_attention_does():
    query, key, value = (t.detach().float() for t in drawn(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        ours = document_attention(query, key, value, starts_of([12], [12]))
    assert ours.dtype is torch.bfloat16
