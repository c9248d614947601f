"""Linears of steps and prompts where zeros behind relu² and 2:4 weights are used, beside dense ones."""

from __future__ import annotations

import pytest
import torch
from rewritten_models import GREEDY, PROMPTS, equal_tokens, llama, rewritten
from slow import slow_but

from act24.errors import Act24Error
from act24.inference import layer as layer_module
from act24.inference import linears as linears_module
from act24.inference import prompts as prompts_module
from act24.inference.generator import Generator
from act24.inference.layer import DENSE, Choice, can_use, step_choices, weights_of
from act24.passes import Pipeline, Weight24
from act24.passes.served import fold_weights_, lower_to_serve_
from act24.sparse24.kernels.dense_decode import dense_decode
from act24.sparse24.kernels.product24 import product24
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.weight.forms import LinearOptions24, product_algorithms, prompt_linear


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("stock", "relu2-act24", "cola-relu2-act24", "lost", "weight24"),
        ["stock", "relu2", "relu", "relu2-act24", "soft", "cola-relu2-act24", "loro", "lost", "weight24"],
    ),
)
@pytest.mark.parametrize(
    "choice",
    slow_but(
        (Choice(True, True, True),), [Choice(True, False), Choice(False, True), Choice(True, True, True)]
    ),
)
def test_sparse_steps_are_the_dense_step(name, choice):
    """In bfloat16, by the kernels' references: logits after a few tokens, beside those of the dense step."""
    model = rewritten(name, num_key_value_heads=2, hidden_size=128, intermediate_size=128).bfloat16()
    if choice.packed:
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                if parameter.ndim == 2 and parameter.shape[1] % 4 == 0:
                    parameter.mul_(top2_of_4(parameter.abs()))
    expected = Generator(model).generate_ids(PROMPTS, 6, GREEDY)
    before = {n: p.clone() for n, p in model.named_parameters()}
    there = can_use(weights_of(model.model.layers))
    assert there.skipping == (name not in ("stock", "loro", "lost", "weight24"))
    if choice.packed and name not in (
        "loro",
        "lost",
        "cola-relu2-act24",
    ):  # whose factors may be too narrow
        assert there.packed == (name != "weight24"), "its linears are not folded here"
    found = Generator(model, choice=choice).generate_ids(PROMPTS, 6, GREEDY)
    assert equal_tokens(found, expected) >= 3 * 6 - 6, "more than a row goes another way: more than rounding"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(p.is_inference() for p in model.parameters()), "nobody could train them"


@pytest.mark.parametrize(
    "choice",
    slow_but((Choice(True, True, True, True),), [Choice(streamed=True), Choice(True, True, True, True)]),
    ids=str,
)
@pytest.mark.parametrize("name", ["relu2", "relu2-act24", "lost"])
def test_streamed_weights_of_one_row_are_the_dense_step(name, choice, monkeypatch):
    """By the reference: one prompt, whose steps are of one token; and the head is streamed too."""
    model = rewritten(name, num_key_value_heads=2, hidden_size=128, intermediate_size=128).bfloat16()
    counted = []

    def counting(x, weight):
        counted.append(tuple(weight.shape))
        return dense_decode(x, weight)

    monkeypatch.setattr(linears_module, "dense_decode", counting)
    for prompts in ([PROMPTS[0]], PROMPTS):
        expected = Generator(model).generate_ids(prompts, 6, GREEDY)
        counted.clear()
        found = Generator(model, choice=choice).generate_ids(prompts, 6, GREEDY)
        assert equal_tokens(found, expected) >= 6 * len(prompts) - 6
        assert bool(counted) == (len(prompts) == 1)
        assert counted.count(tuple(model.head_weight.shape)) == (5 if len(prompts) == 1 else 0)


def test_weights_trained_2_4_are_read_packed_once_they_are_folded():
    model = llama(hidden_size=128, intermediate_size=256)
    pipeline = Pipeline(model, (Weight24(),), keep_all=True)
    pipeline.commit_()
    lower_to_serve_(pipeline, 0)
    fold_weights_(pipeline)
    weights = weights_of(model.eval().bfloat16().model.layers)
    assert weights[0].sparse == {(128, 128), (256, 128), (128, 256)}
    assert can_use(weights) == Choice(packed=True, fused=True)
    found = Generator(model, choice=Choice(packed=True, fused=True)).generate_ids(PROMPTS, 6, GREEDY)
    assert equal_tokens(found, Generator(model).generate_ids(PROMPTS, 6, GREEDY)) >= 3 * 6 - 6


@pytest.mark.parametrize(("name", "features"), [("stock", 192), ("relu2", 256)])
def test_prompts_by_2_4_products(name, features, monkeypatch):
    """By the references, for prompts of many tokens and not of few: the same function but for rounding."""
    model = rewritten(name, num_key_value_heads=2, hidden_size=128, intermediate_size=192).bfloat16()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2 and len(parameter) != features:  # those stay dense
                parameter.mul_(top2_of_4(parameter.abs()))
    asked, multiplied = set(), []

    def algorithm(tokens, shape, table, dtype, device):
        asked.add(shape)
        assert (table, dtype, device.type) == ("a table", torch.bfloat16, "cpu")
        return 0 if tokens >= 20 and shape != (64, 128) else None  # not those of k and v

    def product(packed, dense, *rest):
        multiplied.append((packed.shape[0], *dense.shape))
        return product24(packed, dense, *rest)

    monkeypatch.setattr(prompts_module, "prompt_algorithm", algorithm)
    monkeypatch.setattr(linears_module, "product24", product)
    expected = Generator(model).generate_ids(PROMPTS, 6, GREEDY)
    Generator(model, choice=Choice(fused=True), table="a table").generate_ids(PROMPTS, 3, GREEDY)
    assert not asked, "dense where no 2:4 is chosen"
    before = {n: p.clone() for n, p in model.named_parameters()}
    generator = Generator(model, choice=Choice(packed=True), table="a table")
    generator.generate_ids(PROMPTS[:1], 3, GREEDY)
    assert asked == {(128, 128), (64, 128), (128, features)}
    assert not multiplied, "few tokens"
    found = generator.generate_ids(PROMPTS, 6, GREEDY)
    # Of each block q, o and down, for 27 tokens padded to 64, and nothing of the steps.
    assert multiplied == 2 * [(128, 128, 64), (128, 128, 64), (128, features, 64)]
    assert equal_tokens(found, expected) >= 3 * 6 - 6
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(Act24Error, match="weights changed after they were packed"):
        generator.generate_ids(PROMPTS, 1, GREEDY)


def test_the_rule_for_prompts():
    """By tokens: what was measured for as many or fewer answers, else the rule for what nobody tuned."""
    table = (
        (("linear_y", 2048, 4096, 4096), (3, 2.0, 1.0)),
        (("linear_y", 4096, 4096, 4096), (5, 1.0, 2.0)),
    )
    for tokens, expected in ((1000, None), (2048, None), (4000, None), (4096, 5), (30000, 5)):
        linear = prompt_linear(tokens, 4096, 4096, torch.bfloat16, torch.device("cpu"))
        assert linear.tokens % 64 == 0 <= linear.tokens - tokens < 64
        assert product_algorithms(linear, LinearOptions24(algorithms=table)).get("y") == expected
        untuned = product_algorithms(linear, LinearOptions24())
        assert untuned == ({"y": 17} if tokens >= 16384 else {})
    cpu = torch.device("cpu")
    assert linears_module.prompt_algorithm(4096, (4096, 4096), table, torch.bfloat16, cpu) is None, "no GPU"


@pytest.mark.parametrize(
    ("rows", "skipping", "packed"), [(1, 1, 1), (2, 1, 1), (8, 1, 1), (9, 0, 1), (16, 0, 1), (17, 0, 0)]
)
def test_what_a_step_tries_by_rows(rows, skipping, packed, monkeypatch):
    cuda, everything = torch.device("cuda"), Choice(skipping=True, packed=True)
    for wrong in ("skipping_product", "packed_decode"):  # what the self-check finds of a GPU
        monkeypatch.setattr(
            layer_module,
            "kernel_obstacle_on",
            lambda _, names, wrong=wrong: "wrong" if wrong in names else "",
        )
        tried = step_choices(rows, everything, torch.bfloat16, cuda)
        assert not any(c.skipping if wrong == "skipping_product" else c.packed for c in tried)
    monkeypatch.setattr(layer_module, "kernel_obstacle_on", lambda *_: "")
    tried = step_choices(rows, everything, torch.bfloat16, cuda)
    assert len(tried) == len({*tried}) == 2 ** (skipping + packed)
    assert tried[0] == DENSE
    assert any(c.skipping for c in tried) == bool(skipping)
    assert any(c.packed for c in tried) == bool(packed)
    for dtype, device in ((torch.float32, cuda), (torch.bfloat16, torch.device("cpu"))):
        assert step_choices(rows, everything, dtype, device) == (DENSE,)
