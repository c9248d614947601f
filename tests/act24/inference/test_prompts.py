"""How prompts go through a model: chunks, what is compiled for them, 2:4 products and causal attention."""

from __future__ import annotations

import functools

import pytest
import torch
from reference import greedy
from rewritten_models import GREEDY, PROMPTS, equal_tokens, llama

from act24.inference import linears, prompts
from act24.inference.attention import causal, chunk_attention, chunk_place, place_of
from act24.inference.generator import Generator
from act24.inference.prompts import PromptForms, chunks
from act24.sparse24.pattern.selection import top2_of_4


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 700, 1025, 1537, 1920, 2048, 2500, 4097, 8192, 10_000])
@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_cover_a_prompt_in_few_sizes(tokens, compiled):
    found = [*chunks(tokens, compiled)]
    seen = 0
    for start, size in found:
        assert 0 <= start <= seen, "nothing before a chunk is missing"
        seen = start + size
    assert seen == tokens
    sizes = [size for _, size in found]
    if compiled and tokens >= 256:
        assert {*sizes} <= {256, 512, 1024, 2048}
        assert len({*sizes}) <= 2
        assert sum(sizes) <= max(tokens * 4 / 3, tokens + 256)
    else:
        assert sum(sizes) == tokens


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_chunks_are_compiled_once_a_size_and_never_again(monkeypatch, backend):
    """Which code is compiled again is a matter of guards, which every backend has."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(prompts, "CHUNK", 8)
    monkeypatch.setattr(prompts, "COMPILED", (4, 8))
    model = llama(num_key_value_heads=2)
    row = [5 * n % 31 for n in range(24)]
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        generator = Generator(model, compiled=True)
        # Three chunks of 8; one of 8 and one of 4 that repeats three tokens; and a step.
        for length in (24, 9):
            prompt = row[:length]
            assert generator.generate_ids([prompt], 5, GREEDY) == [greedy(model, prompt, 5)]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
        for length in (23, 17, 16, 8, 7, 5, 4, 3):
            prompt = row[:length]
            assert generator.generate_ids([prompt], 2, GREEDY) == [greedy(model, prompt, 2)]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("start", [0, 5])
def test_attention_without_a_mask_is_that_with_one(heads, start):
    new, length = 6, 16
    query = torch.randn(2, 4, new, 8)
    keys, values = torch.randn(2, 2, heads, length, 8).unbind()
    first = torch.zeros(2, dtype=torch.int64)
    end = start + new
    seen = place_of(torch.arange(start, end), first, length).seen
    scores = query @ keys.repeat_interleave(4 // heads, 1).transpose(-1, -2) / 8**0.5
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values.repeat_interleave(4 // heads, 1)
    found = causal(query, keys[:, :, :end], values[:, :, :end])
    torch.testing.assert_close(found, expected)
    for kernel in (True, False):
        place = chunk_place(start, new, first, False, length, kernel)
        found = chunk_attention(query, keys, values, place.seen, place.host)
        torch.testing.assert_close(found.transpose(1, 2), expected)
        assert found.is_contiguous()
    if heads == 2 and start:
        torch.library.opcheck(chunk_attention, (query, keys, values, place.seen, place.host))


def sparse_model():
    model = llama(hidden_size=128, intermediate_size=128, num_hidden_layers=1).bfloat16()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(top2_of_4(parameter.abs()))
    return model


def forms_of(model, measures):
    blocks, sparse = [*model.model.layers], frozenset({(128, 128)})
    return PromptForms(blocks, sparse, (), torch.bfloat16, torch.device("cpu"), measures)


@pytest.mark.parametrize("faster", [True, False])
def test_a_chunk_takes_2_4_products_only_where_it_is_faster_with_them(monkeypatch, faster):
    """The part of cuSPARSELt is played by its reference, and that of the clock by what is wanted."""
    monkeypatch.setattr(linears, "why_not_packed", lambda *_: "")
    monkeypatch.setattr(linears, "product_algorithms", lambda *_: {"y": 3})
    timed = []

    def seconds(run, forms, device):
        run(forms)
        timed.append(forms)
        return 2.0 - faster * (len(timed) % 2 == 0)

    monkeypatch.setattr(prompts, "_seconds", seconds)
    model = sparse_model()
    expected = Generator(model).generate_ids(PROMPTS, 3, GREEDY)
    generator = Generator(model)
    generator.decoder.prompts = made = forms_of(model, measures=True)
    found = generator.generate_ids(PROMPTS, 3, GREEDY)
    assert equal_tokens(found, expected) >= 8
    assert made.taken == {(3, 16): {(128, 128): 3} if faster else {}}
    assert made.times == {(3, 16): (2.0, 1.0 if faster else 2.0)}
    generator.generate_ids([prompt * 2 for prompt in PROMPTS], 1, GREEDY)  # 18 tokens: another size
    assert [*made.taken] == [(3, 16), (3, 32)]
    generator.generate_ids(PROMPTS, 3, GREEDY)
    assert len(timed) == 4, "measured once a size"


def test_packed_weights_of_prompts_are_packed_once(monkeypatch):
    monkeypatch.setattr(linears, "why_not_packed", lambda *_: "")
    monkeypatch.setattr(linears, "product_algorithms", lambda linear, _: {"y": linear.tokens // 64})
    packed = []
    pack = prompts.cached_layers

    def counted(*arguments, **named):
        packed.append(named)
        return pack(*arguments, **named)

    monkeypatch.setattr(prompts, "cached_layers", counted)
    model = sparse_model()
    made = forms_of(model, measures=False)
    generator = Generator(model)
    generator.decoder.prompts = made
    for _ in range(3):
        generator.generate_ids([[1] * 60], 2, GREEDY)
    assert [*filter(None, packed)] == [{"products": {(128, 128): 1}}]
    generator.generate_ids([[1] * 70], 2, GREEDY)  # another algorithm
    assert [*filter(None, packed)][1:] == [{"products": {(128, 128): 2}}]
