"""Attention within documents, against each document alone and against masks that PyTorch makes itself."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from act24.document_attention import BLOCK, block_mask, document_attention, seen, uses_flex
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


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.lists(st.integers(1, 200), min_size=1))
def test_the_block_mask_is_the_one_that_pytorch_makes_of_all_pairs(first, second):
    """Blocks of queries and of keys, in both directions: forward reads the one, backward the other."""
    length = min(sum(first), sum(second))
    starts = torch.stack([starts_of(lengths)[0, :length] for lengths in (first, second)])
    document = starts.clone()

    def sees(row, head, query, key):
        return (document[row, query] == document[row, key]) & (query >= key)

    theirs = create_block_mask(sees, 2, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    ours = block_mask(starts)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(seen(starts)[:, None], dense(sees, 2, length))
    for name in ("kv", "q"):
        number, indices = getattr(ours, f"{name}_num_blocks"), getattr(ours, f"{name}_indices")
        whole, theirs_too = (getattr(theirs, f"full_{name}_{what}") for what in ("num_blocks", "indices"))
        for row in range(2):
            for block in range(number.shape[-1]):
                expected = {*blocks(theirs, name, row, block), *taken(whole, theirs_too, row, block)}
                assert taken(number, indices, row, block) == sorted(expected)


def blocks(mask, name, row, block):
    return taken(getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices"), row, block)


def taken(number, indices, row, block):
    return indices[row, 0, block, : number[row, 0, block]].tolist()


def dense(sees, rows, length):
    position = torch.arange(length)
    row = torch.arange(rows)[:, None, None, None]
    return sees(row, 0, position[:, None], position).expand(rows, 1, length, length)


def test_flex_attention_takes_the_block_mask():
    """Compiled without a graph break; on a CPU forward only, for that is all flex attention has there."""
    query, key, value = (t.detach().float() for t in drawn(4, 2, length=300, width=16))
    starts = starts_of([100, 7, 193], [300])

    @torch.compile(fullgraph=True)
    def flex(query, key, value, starts):
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, block_mask=block_mask(starts), enable_gqa=True)

    torch.testing.assert_close(
        flex(query, key, value, starts), document_attention(query, key, value, starts, True)
    )


def test_beginnings_of_other_rows_are_refused():
    query, key, value = drawn(4, 4)
    with pytest.raises(Act24Error, match=r"beginnings are of rows \(2, 11\), and these are \(2, 12\)"):
        document_attention(query, key, value, starts_of([11], [11]))


def test_only_compiled_on_a_gpu_it_is_flex_attention():
    kinds = [(device, compiled) for device in ("cpu", "cuda") for compiled in (False, True)]
    assert [uses_flex(torch.device(d), c) for d, c in kinds] == [False, False, False, True]


def test_under_autocast_it_computes_as_scaled_dot_product_attention_does():
    query, key, value = (t.detach().float() for t in drawn(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        ours = document_attention(query, key, value, starts_of([12], [12]))
    assert ours.dtype is torch.bfloat16
