"""The hand-written models of the benchmark compute what the traced ones do, so that only time differs."""

import pytest
import torch
from slow import slow_but

from act24.initialise import build_llama
from act24.passes import Cola, Lost, LowRank, Relu2FFN, apply_
from act24.tools.bench.step import _handwritten_form
from act24.tools.run.build import model_config

RANKS = {"attn_rank": 8, "mlp_rank": 12}
PASSES = {
    "dense": [],
    "relu2": [Relu2FFN()],
    "loro": [LowRank(**RANKS)],
    "loro relu2": [Relu2FFN(), LowRank(**RANKS)],
    "cola": [Cola(**RANKS)],
    "cola, SiLU dropped": [Cola(**RANKS, mlp_activation="drop")],
    "cola relu2 bottleneck": [Relu2FFN(), Cola(**RANKS, bottleneck="relu2")],
    "lost": [Lost(**RANKS, sparsity=0.1, gamma=0.7)],
}
NAMES = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
}


def named(name, lost):
    """The name in the hand-written model."""
    name = name.replace("model.embed_tokens", "embedding").replace("model.norm", "norm")
    name = name.replace("model.layers", "blocks").replace("lm_head", "head")
    for traced, hand in NAMES.items():
        name = name.replace(traced, hand)
    low = "low." if lost else ""
    for traced, hand in (("weight_in", f"{low}down.weight"), ("weight_out", f"{low}up.weight")):
        name = name.replace(traced, hand)
    return name.replace("weight_columns", "columns.weight").replace("column_indices", "indices")


QUICK = [PASSES[name] for name in ("loro relu2", "cola relu2 bottleneck", "lost")]


@pytest.mark.parametrize("passes", slow_but(QUICK, PASSES.values()), ids=PASSES)
def test_it_is_the_same_mathematics(tiny, passes):
    recipe = tiny().model_copy(update={"passes": tuple(passes)})
    config = model_config(recipe)
    traced = build_llama(config, 0)
    apply_(traced, passes)
    hand = _handwritten_form(recipe, config)()
    lost = any(isinstance(p, Lost) for p in passes)
    hand.load_state_dict({named(name, lost): value for name, value in traced.state_dict().items()})
    ids = torch.randint(300, (2, 9))
    torch.testing.assert_close(hand(ids), traced.model(ids), rtol=1e-4, atol=1e-5)
