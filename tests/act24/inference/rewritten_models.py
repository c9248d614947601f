"""Models with every pass, and prompts, for the tests of this folder."""

from __future__ import annotations

from act24.inference.layer import Choice
from act24.inference.sampling import Sampling
from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    Lora,
    Lost,
    LowRank,
    MaskedLora,
    Pass,
    Pipeline,
    Recompute,
    Relu2FFN,
    SparseMask,
    Weight24,
)
from act24.passes.served import lower_to_serve_
from act24.rotary import RotaryScaling

GREEDY = Sampling(temperature=0)
FUSED = Choice(fused=True)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]
RANKS = {"attn_rank": 8, "mlp_rank": 8}

PASSES: dict[str, tuple[Pass, ...]] = {
    "stock": (),
    "relu2": (Relu2FFN(),),
    "relu": (Relu2FFN(activation="relu"),),
    "relu2-act24": (Relu2FFN(), Activation24()),
    "mvue": (Relu2FFN(), Activation24(method="mvue")),
    "soft": (Relu2FFN(), Activation24(method="soft_dynamic", backward="split_gemm")),
    "loro": (LowRank(**RANKS),),
    "cola-relu2-act24": (Relu2FFN(), Cola(**RANKS, bottleneck="relu2"), Activation24()),
    "lost": (Lost(**RANKS),),
    "weight24": (Weight24(),),
    "weight24-soft": (Weight24(method="soft_threshold"),),
    "recompute": (LowRank(**RANKS), Recompute()),
    "fp8": (Relu2FFN(), Fp8()),
    "watched": (Relu2FFN(), ActivationStatistics()),
    "sparse_mask": (SparseMask(masks="zeros"),),
    "lora": (Lora(),),
    "masked_lora": (MaskedLora(),),
}
#: Their operations hold the weights that others multiply by linears.
UNFUSED = ("weight24", "weight24-soft", "lost", "masked_lora", "cola-relu2-act24")

ROTARY = {
    "plain": None,
    "linear": RotaryScaling("linear", 2.0),
    "llama3": RotaryScaling(
        "llama3", 4.0, original_max_position_embeddings=8, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "yarn": RotaryScaling("yarn", 4.0, original_max_position_embeddings=8),
}


def llama(**overrides) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 31,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    return build_llama(LlamaConfig(**{**sizes, **overrides}), seed=0).eval()


def rewritten(name: str, **overrides) -> LlamaForCausalLM:
    model = llama(**overrides)
    pipeline = Pipeline(model, PASSES[name], keep_all=True)
    pipeline.commit_()
    lower_to_serve_(pipeline, 0)
    return model.eval()


def equal_tokens(rows: list[list[int]], others: list[list[int]]) -> int:
    return sum(
        a == b for row, other in zip(rows, others, strict=True) for a, b in zip(row, other, strict=True)
    )
