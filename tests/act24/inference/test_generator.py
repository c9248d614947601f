"""Cached generation against the model run again for every token, and against prompts on their own."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from reference import greedy
from rewritten_models import FUSED, GREEDY, PASSES, PROMPTS, ROTARY, UNFUSED, equal_tokens, llama, rewritten
from slow import slow_after, slow_but

import act24
from act24.errors import Act24Error
from act24.inference import decoder as decoder_module
from act24.inference import prompts as prompts_module
from act24.inference.cache import kept
from act24.inference.generator import Generator
from act24.inference.layer import DENSE, Choice, can_use, weights_of
from act24.inference.sampling import Sampling
from act24.llama import LlamaForCausalLM
from act24.passes import (
    REGISTRY,
)
from act24.sparse24.pattern.selection import top2_of_4


def test_every_pass_is_here():
    assert {p.name for passes in PASSES.values() for p in passes} == {*REGISTRY}


def on_their_own(model: LlamaForCausalLM, tokens: int) -> list[list[int]]:
    return [greedy(model, prompt, tokens) for prompt in PROMPTS]


#: Every pass with half as many heads of keys; one of them with as many as of queries, and with one.
OTHER_METHODS = ("mvue", "soft", "weight24-soft")
QUICK = [*((name, 2) for name in PASSES if name not in OTHER_METHODS), ("relu2-act24", 4), ("relu2-act24", 1)]


@pytest.mark.parametrize(("name", "heads"), slow_but(QUICK, itertools.product(PASSES, (4, 2, 1))))
def test_greedy_is_that_of_the_model_without_a_cache(name, heads):
    model = rewritten(name, num_key_value_heads=heads)
    expected = on_their_own(model, 12)
    assert len({token for row in expected for token in row}) > 4  # and not one token for ever
    assert Generator(model).generate_ids(PROMPTS, 12, GREEDY) == expected
    if heads == 2:
        groups = [group for each in weights_of(model.model.layers) for group in each.together]
        assert bool(groups) == (name not in UNFUSED)
        assert Generator(model, choice=FUSED).generate_ids(PROMPTS, 12, GREEDY) == expected


@pytest.mark.parametrize(("name", "heads"), list(itertools.product(ROTARY, (4, 2))))
def test_rotary_scalings_and_odd_heads(name, heads):
    model = llama(rope_scaling=ROTARY[name], num_key_value_heads=heads, head_dim=24, tie_word_embeddings=True)
    assert Generator(model).generate_ids(PROMPTS, 20, GREEDY) == on_their_own(model, 20)


@pytest.mark.parametrize("chunk", [1, 2, 4, 9])
def test_a_prompt_in_chunks_is_the_same_prompt(chunk, monkeypatch):
    monkeypatch.setattr(prompts_module, "CHUNK", chunk)
    model = llama(num_key_value_heads=2)
    assert Generator(model).generate_ids(PROMPTS, 6, GREEDY) == on_their_own(model, 6)


def test_a_batch_after_another_sees_nothing_of_it():
    model = llama()
    generator = Generator(model)
    generator.generate_ids([[7] * 60, [8] * 90, [9] * 30], 20, GREEDY)
    assert generator.generate_ids(PROMPTS, 12, GREEDY) == on_their_own(model, 12)
    assert generator.generate_ids(PROMPTS[:1], 200, GREEDY) == [greedy(model, PROMPTS[0], 200)]


@pytest.mark.parametrize("backend", slow_after(1, ["aot_eager", "inductor"]))
def test_a_compiled_step_is_the_same_step_and_compiled_once_a_shape(monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = rewritten("relu2-act24", num_hidden_layers=3, num_key_value_heads=2)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        generator = Generator(model, compiled=True)
        assert generator.generate_ids(PROMPTS, 12, GREEDY) == on_their_own(model, 12)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        generator.generate_ids(PROMPTS, 30, GREEDY)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert generator.generate_ids(PROMPTS[:1], 12, GREEDY) == on_their_own(model, 12)[:1]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5, top_p=0.9), Sampling(temperature=3.0)])
def test_a_draw_is_of_the_seed_and_of_no_neighbour(sampling):
    generator = Generator(llama())
    together = generator.generate_ids(PROMPTS, 20, sampling, seed=5)
    alone = [
        generator.generate_ids([prompt], 20, sampling, seed=5 + row)[0] for row, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert together != generator.generate_ids(PROMPTS, 20, sampling, seed=6)


def cut(row: list[int], ends: set[int]) -> list[int]:
    places = [place for place, token in enumerate(row) if token in ends]
    return row[: places[0] + 1] if places else row


def test_rows_end_with_their_own_end_of_text():
    model = llama()
    rows = on_their_own(model, 12)
    end = rows[0][5]
    ended = llama(eos_token_id=(end, 30))
    found = Generator(ended).generate_ids(PROMPTS, 12, GREEDY)
    assert found == [cut(row, {end, 30}) for row in rows]
    assert len({len(row) for row in found}) > 1
    assert Generator(ended).generate_ids(PROMPTS, 12, GREEDY, until_end=False) == rows


class Letters:
    """A token a letter; the end of text, 30, is none."""

    eos_id = 30

    def encode(self, text: str) -> list[int]:
        return ["abcdefghijklmnopqrstuvwxyz0123".index(letter) for letter in text]

    def decode(self, ids) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyz0123"[id] for id in ids if id != 30)

    def known_ids(self, size: int) -> torch.Tensor:
        return torch.arange(size) != 29


def test_text_streams_and_ends_before_a_stop_string():
    model = llama()
    generator = Generator(model, Letters())
    prompts = ["dab", "zz"]
    whole = generator(prompts, 16, GREEDY)
    assert [done.reason for done in whole] == ["length"] * 2 or "end" in {done.reason for done in whole}
    text = whole[0].text
    stop = text[4:6]
    place = text.index(stop)
    done = {}
    pieces = list(generator.stream(prompts, 16, GREEDY, (stop, "nothing of this"), done=done))
    assert "".join(piece.text for piece in pieces if piece.row == 0) == text[:place] == done[0].text
    assert done[0].reason == "stop"
    assert "".join(piece.text for piece in pieces if piece.row == 1) == done[1].text
    assert sorted(piece.row for piece in pieces if piece.reason) == [0, 1]
    # One piece a token, and the prompts take turns: text is shown as it comes.
    assert [piece.row for piece in pieces if piece.text][:4] == [0, 1, 0, 1]


def test_a_token_that_the_tokenizer_lacks_is_never_taken():
    model = llama()
    with torch.no_grad():
        model.head_weight[29] = 100 * model.head_weight[0]
    drawn = Generator(model, Letters()).generate_ids(PROMPTS, 200, Sampling(temperature=5.0), until_end=False)
    assert 29 not in {token for row in drawn for token in row}


@pytest.mark.parametrize(
    ("prompts", "options", "told"),
    [
        (["abc", ""], {}, "prompt 1 is empty"),
        (["a" * 32], {}, "the prompt has 32 tokens, and the model 32 positions, with none left"),
        (["a" * 20], {"tokens": 20}, "12 tokens can be added, not 20"),
        (["a"], {"tokens": 0}, "tokens has to be 1 or more, got 0"),
        (["a"], {"seed": 2**62}, "seed has to be 0 or more and below"),
        (["a"], {"seed": -1}, "seed has to be 0 or more"),
        (["a"], {"stop": ("x", "")}, "a stop string is empty"),
        (["\udcff"], {}, "prompt 0 is no UTF-8"),
    ],
)
def test_bad_input_is_named(prompts, options, told):
    generator = Generator(llama(max_position_embeddings=32), Letters())
    with pytest.raises(Act24Error, match=told):
        generator(prompts, **{"tokens": 4, **options})


def test_ids_beyond_the_vocabulary_and_other_models_are_refused():
    with pytest.raises(Act24Error, match="prompt 1 holds id 31; the model's vocabulary has 31"):
        Generator(llama()).generate_ids([[1], [2, 31]], 4)
    with pytest.raises(Act24Error, match="not Linear"):
        act24.Generator(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_batch_that_does_not_fit_says_what_it_needs():
    generator = Generator(llama(max_position_embeddings=10**9, num_key_value_heads=4))
    # 4 heads of 16, 2 blocks, keys and values, float32: 1 KiB a slot.
    with pytest.raises(
        Act24Error, match=r"1 row of 900,\d{3},\d{3} tokens needs 858\.\d\d GiB of keys and values"
    ):
        generator.generate_ids([[1]], 900_000_000)


def test_a_host_that_would_promise_memory_it_lacks_is_not_asked():
    generator = Generator(llama(), memory=10 * 2**20)
    # 256 slots of 1 KiB a row: 12 MiB, of 10 less a tenth.
    told = r"48 rows of 256 tokens need 0\.01 GiB .* does not have: 36 rows fit"
    with pytest.raises(Act24Error, match=told):
        generator.generate_ids([[1]] * 48, 200)
    assert len(generator.generate_ids([[1]] * 36, 150)) == 36


@pytest.mark.parametrize("where", ["_prefill", "_advance"])
def test_a_device_that_runs_out_says_so_and_goes_on(monkeypatch, where):
    model = llama()
    generator = Generator(model)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(decoder_module.Decoder, where, full)
        with pytest.raises(Act24Error, match=r"3 rows of .* take fewer rows at once"):
            generator.generate_ids(PROMPTS, 5, GREEDY)
    assert generator.generate_ids(PROMPTS, 5, GREEDY) == on_their_own(model, 5)


def test_fused_products_read_the_biases_too_and_keep_no_weight_twice():
    model = llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    before = {n: p.clone() for n, p in model.named_parameters()}
    expected = on_their_own(model, 12)
    assert Generator(model, choice=FUSED).generate_ids(PROMPTS, 12, GREEDY) == expected
    assert on_their_own(model, 12) == expected, "the model itself reads the same tensors"
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n])
        assert not p.is_inference()
    groups = [group for weights in weights_of(model.model.layers) for group in weights.together.values()]
    assert len(groups) == 2 * 4
    assert all(len({p.untyped_storage().data_ptr() for p in group}) == 1 for group in groups)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == sum(p.numel() * p.itemsize for p in model.parameters())
    assert {*model.state_dict()} == {*before}


def test_q_k_and_v_and_gate_and_up_are_one_product_each():
    model = llama(num_key_value_heads=2)
    together = weights_of(model.model.layers)[0].together
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    wanted = [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    assert [[id(p) for p in group] for group in together.values()] == [
        [id(linear.weight) for linear in group] for group in wanted
    ]


def test_weights_that_move_or_change_are_followed_or_refused():
    model = rewritten("relu2", hidden_size=128, intermediate_size=128)
    generator = Generator(model, choice=FUSED)
    generator.generate_ids(PROMPTS, 2, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)  # in place
    assert generator.generate_ids(PROMPTS, 12, GREEDY) == on_their_own(model, 12)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.2  # elsewhere
    assert generator.generate_ids(PROMPTS, 12, GREEDY) == on_their_own(model, 12)

    model.bfloat16()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(top2_of_4(parameter.abs()))
    generator = Generator(model, choice=Choice(packed=True))
    first = generator.generate_ids(PROMPTS, 12, GREEDY)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(-3)
    with pytest.raises(Act24Error, match="weights changed after they were packed: make a new Generator"):
        generator.generate_ids(PROMPTS, 12, GREEDY)
    again = Generator(model, choice=Choice(packed=True)).generate_ids(PROMPTS, 12, GREEDY)
    assert again != first
    assert equal_tokens(again, Generator(model).generate_ids(PROMPTS, 12, GREEDY)) > 24


#: Seconds of three blocks by what is tried, and what each is to do; None: the dense step was faster.
MEASURED = {
    "a block differs": (
        {DENSE: [4, 4, 4], FUSED: [3, 3, 3], Choice(True, fused=True): [5, 2, 2]},
        (FUSED, Choice(True, fused=True), Choice(True, fused=True)),
    ),
    "nothing gains": (
        {DENSE: [3, 3, 3], FUSED: [4, 4, 4], Choice(True): [5, 4, 4]},
        (DENSE, DENSE, DENSE),
    ),
    "unfused, and one skips": (
        {DENSE: [3, 3, 3], FUSED: [4, 4, 4], Choice(True): [5, 4, 2]},
        (DENSE, DENSE, Choice(True)),
    ),
    "one row, streamed": (
        {
            DENSE: [4, 4, 4],
            FUSED: [3, 3, 3],
            FUSED._replace(streamed=True): [2, 2, 4],
            Choice(True, fused=True, streamed=True): [1, 2, 5],
        },
        (Choice(True, fused=True, streamed=True), FUSED._replace(streamed=True), FUSED),
    ),
    "whole step says no": (
        {DENSE: [4, 4, 4], FUSED: [3, 3, 3], Choice(True, fused=True): [5, 2, 2]},
        None,
    ),
    "whole step says no, beside fused products": (
        {DENSE: [4, 4, 4], FUSED: [3, 3, 3], Choice(True, fused=True): [5, 2, 2]},
        (FUSED, FUSED, FUSED),
    ),
}


@pytest.mark.parametrize(
    "case", slow_but(("a block differs", "one row, streamed", "whole step says no"), MEASURED)
)
def test_each_block_takes_its_fastest_choice_and_it_is_remembered(monkeypatch, case):
    """A CUDA device's part played by the CPU: a captured step is one that runs when it is replayed."""
    block_seconds, wanted = MEASURED[case]

    class Graph:
        def __init__(self, run):
            self.replay = run

    captured, timed = [], []

    def capture(decoder, batch, sampling, plan):
        captured.append(plan)
        with kept(batch):  # as a capture warms up: this step does not count
            decoder._advance(batch, sampling, plan)
        return Graph(lambda: decoder._advance(batch, sampling, plan))

    def seconds(decoder, batch, choice):
        timed.append(choice)
        return block_seconds[choice]

    def step_seconds(decoder, batch, graph):
        return 1.0 if captured[-1] == (wanted or dense) else 2.0

    dense = (DENSE,) * 3
    monkeypatch.setattr(decoder_module.Decoder, "_captured", capture)
    monkeypatch.setattr(decoder_module.Decoder, "_block_seconds", seconds)
    monkeypatch.setattr(decoder_module.Decoder, "_seconds", step_seconds)
    monkeypatch.setattr(decoder_module, "step_choices", lambda *_: (DENSE, Choice(skipping=True)))
    streams = any(choice.streamed for choice in block_seconds)
    monkeypatch.setattr(decoder_module, "why_not_streamed", lambda *_: "" if streams else "not here")
    model = rewritten("relu2", num_key_value_heads=2, num_hidden_layers=3).bfloat16()
    generator = Generator(model, compiled=False)
    decoder = generator.decoder
    decoder._captures, decoder._choice = True, None
    decoder._weights = weights_of(model.model.layers)
    decoder._there = can_use(decoder._weights)
    found = generator.generate_ids(PROMPTS, 9, GREEDY)
    assert timed == [*block_seconds]
    assert decoder.plans == {3: wanted or dense}
    for block, choice in zip(model.model.layers, wanted or dense, strict=True):
        down = block.mlp.down_proj.weight
        assert (down.T if choice.skipping else down).is_contiguous(), "laid out for the plan that runs"
    count = len(captured)
    assert count == (1 if wanted == dense else len({*captured}) + 1)
    assert {*decoder.times.get(3, {})} == (set() if wanted == dense else {*captured})
    other = Sampling(temperature=0, top_k=5)
    assert generator.generate_ids(PROMPTS, 9, other) == found
    assert captured[count:] == [wanted or dense], "another capture, and not measured again"
    # The plan decides the tokens, however it was come by.
    forced = Generator(model)
    forced.decoder._weights, forced.decoder.plans = decoder._weights, {3: wanted or dense}
    assert forced.generate_ids(PROMPTS, 9, GREEDY) == found
    assert equal_tokens(found, Generator(model).generate_ids(PROMPTS, 9, GREEDY)) >= 18
