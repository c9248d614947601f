"""Families of transformers that the table lacks: pictures, sounds, both, and text that is read both ways.

What a pass does to them is what the same, written into the stock model by hand, does; what the report or a
refusal says of them reads as a line.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from act24.passes import (
    Activation24,
    Fp8,
    Lora,
    LowRank,
    Pass,
    PassError,
    Pipeline,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
)
from act24.passes.graph.probe import Arguments, guesses
from act24.passes.report import Report
from act24.passes.weight24 import MASK

transformers = pytest.importorskip("transformers", minversion="5")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_WORDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {**_LAYERS, **_WORDS, "max_position_embeddings": 16, "projection_dim": 16}
_PICTURES = {**_LAYERS, "image_size": 32, "patch_size": 16, "projection_dim": 16}
_SOUND: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}

#: By the name of the model: arguments of its configuration, and what it is then looked at on.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "ASTModel": (
        {**_LAYERS, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8},
        "input_values [2, 32, 16]",
    ),
    "CLIPModel": (
        {"text_config": _TEXT, "vision_config": _PICTURES},
        "pixel_values [2, 3, 32, 32], input_ids [2, 8]",
    ),
    "DebertaV2Model": ({**_LAYERS, "vocab_size": 99}, "input_ids [2, 8]"),
    "Dinov2Model": (_PICTURES, "pixel_values [2, 3, 32, 32]"),
    "GPT2LMHeadModel": (
        {**_WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "input_ids [2, 8]",
    ),
    "ModernBertModel": ({**_LAYERS, **_WORDS, "cls_token_id": 3, "sep_token_id": 4}, "input_ids [2, 8]"),
    "SwinModel": (
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "pixel_values [2, 3, 32, 32]",
    ),
    "T5ForConditionalGeneration": (_SMALL, "input_ids [2, 8], decoder_input_ids [2, 8]"),
    "UMT5ForConditionalGeneration": (_SMALL, "input_ids [2, 8], decoder_input_ids [2, 8]"),
    "ViTModel": (_PICTURES, "pixel_values [2, 3, 32, 32]"),
    "VideoMAEModel": (
        {**_PICTURES, "num_frames": 4, "tubelet_size": 2},
        "pixel_values [2, 4, 3, 32, 32]",
    ),
    "Wav2Vec2Model": ({**_LAYERS, **_SOUND}, "input_values [2, 270]"),
}
PASSES: dict[str, list[Pass]] = {
    "relu2_ffn + activation24": [Relu2FFN(gate="any"), Activation24()],
    "activation24": [Activation24()],
    "low_rank": [LowRank(attn_rank=4, mlp_rank=4)],
    "weight24": [Weight24()],
    "fp8": [Fp8()],
    "lora": [Lora(rank=2, targets=("*",))],
}
#: Characters of a line that somebody reads.
LINE = 420


def build(name: str) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**FAMILIES[name][0])).eval()


def planned(model: Any, passes: list[Pass]) -> Report | str:
    """The report, or the refusal."""
    try:
        return plan(model, passes)
    except PassError as error:
        return str(error)


def outputs(model: Any, given: Arguments) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(*given.args, **given.kwargs)
    return [v for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()]


def by_hand(stock: Any, pipeline: Pipeline) -> Any | None:
    """The stock model with what a pass computes written into it; None: of this pass it cannot be."""
    stock, first = copy.deepcopy(stock), pipeline.passes[0]
    if isinstance(first, LowRank):
        stock.load_state_dict(pipeline.state_to_stock(pipeline.model.state_dict()))
    elif isinstance(first, Weight24):
        buffers = dict(pipeline.model.named_buffers())
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                if name + MASK in buffers:
                    parameter.mul_(buffers[name + MASK])
    return stock if isinstance(first, LowRank | Weight24 | Lora) else None


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_said_is_what_runs_and_reads_as_lines(name: str, passes: str) -> None:
    stock = build(name)
    given = next(guesses(stock))
    assert str(given) == FAMILIES[name][1]
    report = planned(stock, PASSES[passes])
    if isinstance(report, str):
        assert "\n" not in report
        assert len(report) <= LINE
        assert ": " in report.partition("matches nothing. ")[2]  # a reason, and what to do
        return
    assert f"checked on {given}: " in report.checked
    assert "not checked" not in report.checked
    assert all(len(line) <= LINE for line in str(report).splitlines())
    model = copy.deepcopy(stock)
    pipeline = apply_(model, PASSES[passes])
    assert pipeline.report.rows == report.rows
    found, expected = outputs(model, given), by_hand(stock, pipeline)
    assert all(bool(value.isfinite().all()) for value in found)
    if expected is not None:
        torch.testing.assert_close(found, outputs(expected, given), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["UMT5ForConditionalGeneration", "ModernBertModel"])
def test_gelu_gates_in_front_of_a_dropout_are_taken(name: str) -> None:
    report = plan(build(name), [Relu2FFN(gate="gelu")])
    (coverage,) = report.coverage
    assert coverage.reached == coverage.total
    assert {row.before for row in report.rows} == {"gelu(gate)·up, F 64"}
