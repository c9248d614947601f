"""`act24 merge`: adapters of any origin by the formula; nothing of them, or of masks, is lost."""

import importlib.util
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from slow import slow_but

from act24.errors import Act24Error
from act24.tools.huggingface.export import export_run
from act24.tools.pruning.folder import prune_model
from act24.tools.pruning.masks import read_masks
from act24.tools.pruning.merge import merge
from act24.tools.run.build import load
from act24.tools.run.opening import open_any
from act24.tools.run.train import train
from tests.tools.pruning.test_prune_command import (  # noqa: F401
    model_folder,
    options,
    words,
)
from tests.tools.run.test_pretrained import branch

IDS = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0))


def peft_folder(folder, shapes, rank=4, tensors=None, **config):
    """An adapter as PEFT writes it, of random factors, for weights of the shapes `[out, in]`."""
    folder.mkdir()
    written = {}
    for name, (rows, columns) in shapes.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        written[f"{path}.lora_A.weight"] = torch.randn(rank, columns)
        written[f"{path}.lora_B.weight"] = torch.randn(rows, rank) / 10
    save_file(written | (tensors or {}), folder / "adapter_model.safetensors", {"format": "pt"})
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "init_lora_weights": True,
               "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "use_dora": False,
               "megatron_core": "megatron.core", "qalora_group_size": 16}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return written


def of_layers(state, *leaves):
    return {n: tuple(v.shape) for n, v in state.items() if n.endswith(tuple(f"{x}.weight" for x in leaves))}


def test_what_is_merged_is_the_formula_where_weights_lie_transposed_too(model_folder, tmp_path):  # noqa: F811
    """GPT-2 stores `[in, out]`: the square c_proj of attention gives no other sign of that."""
    source = model_folder("gpt2")
    before = load_file(source / "model.safetensors")
    names = [name for name in before if name.endswith(("c_attn.weight", "attn.c_proj.weight"))]
    shapes = {f"transformer.{name.removeprefix('transformer.')}": before[name].T.shape for name in names}
    factors = peft_folder(tmp_path / "adapter", shapes, fan_in_fan_out=True)
    merge(str(source), tmp_path / "merged", tmp_path / "adapter")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name in names:
        path = f"base_model.model.transformer.{name.removeprefix('transformer.').removesuffix('.weight')}"
        x = torch.randn(3, before[name].shape[0])
        adapted = (
            x @ before[name] + 2 * x @ factors[f"{path}.lora_A.weight"].T @ factors[f"{path}.lora_B.weight"].T
        )
        torch.testing.assert_close(x @ after[name], adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", slow_but(("masked_lora",), ["lora", "masked_lora"]))
def test_a_run_of_gpt2_merges_to_its_function(use, model_folder, words, tmp_path):  # noqa: F811
    prune_model(str(model_folder("gpt2")), tmp_path / "pruned", **options(words))
    passes = [{"use": use, "targets": ["*.attn.*"], "rank": 2}]
    made = branch(words, tmp_path / "pruned", passes, "train.steps=3", "optimizer.lr=1e-2")
    train(made, tmp_path / "run")
    with torch.no_grad():
        trained = load(tmp_path / "run").model(IDS).logits
    base = open_any(str(tmp_path / "pruned")).model(IDS).logits
    assert not torch.allclose(base, trained, rtol=1e-2, atol=1e-2)
    export_run(tmp_path / "run", tmp_path / "adapter", "peft")
    dense = use == "lora"
    if dense and importlib.util.find_spec("peft"):
        import peft

        under = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
        opened = peft.PeftModel.from_pretrained(under, tmp_path / "adapter").eval()
        # The networks' c_proj, which are called as the attention's, have none.
        assert sum("lora_A" in name for name, _ in opened.named_parameters()) == 4
        with torch.no_grad():
            torch.testing.assert_close(opened(IDS).logits, trained, rtol=1e-4, atol=1e-4)
    merge(str(tmp_path / "run"), tmp_path / "one", allow_dense=dense)
    merge(str(tmp_path / "pruned"), tmp_path / "two", tmp_path / "adapter", allow_dense=dense)
    for merged in ("one", "two"):
        with torch.no_grad():
            torch.testing.assert_close(
                open_any(str(tmp_path / merged)).model(IDS).logits, trained, rtol=1e-4, atol=1e-4
            )
        config = json.loads((tmp_path / merged / "config.json").read_text())
        assert config.get("act24_weight_pattern") == "2:4"
        # Without an adapter are the two matrices of each MLP.
        assert len(read_masks(tmp_path / merged).masks) == (4 if dense else 8)


def test_zeros_of_one_weight_in_many_are_not_filled(model_folder, words, tmp_path):  # noqa: F811
    """By the masks, however few of all weights they are of; what has no mask may be merged into, and the
    masks of what is left alone stay."""
    table = {"*.layers.1.self_attn.q_proj": "2:4", "*.layers.0.mlp.*": "2:4", "*": "dense"}
    prune_model(str(model_folder()), tmp_path / "pruned", **options(words), by_layer=table)
    before = load_file(tmp_path / "pruned" / "model.safetensors")
    assert len(read_masks(tmp_path / "pruned").masks) == 4
    peft_folder(tmp_path / "q", of_layers(before, "q_proj"))
    with pytest.raises(
        Act24Error, match=r"zeros of 1 pruned weights, model.layers.1.self_attn.q_proj.weight"
    ):
        merge(str(tmp_path / "pruned"), tmp_path / "out", tmp_path / "q")
    assert not (tmp_path / "out").exists()
    merge(str(tmp_path / "pruned"), tmp_path / "out", tmp_path / "q", allow_dense=True)
    networks = {name for name in before if ".layers.0.mlp." in name}
    assert set(read_masks(tmp_path / "out").masks) == networks
    peft_folder(tmp_path / "v", of_layers(before, "v_proj"))
    merge(str(tmp_path / "pruned"), tmp_path / "more", tmp_path / "v")
    assert set(read_masks(tmp_path / "more").masks) == networks | {"model.layers.1.self_attn.q_proj.weight"}


def test_zeros_of_another_program_are_not_filled(model_folder, words, tmp_path):  # noqa: F811
    source = model_folder()
    state = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name][:, ::2] = 0
    save_file(state, source / "model.safetensors", {"format": "pt"})
    peft_folder(tmp_path / "adapter", of_layers(state, "q_proj"))
    with pytest.raises(Act24Error, match=f"zeros of 1 pruned weights, {name}"):
        merge(str(source), tmp_path / "out", tmp_path / "adapter")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "why"),
    [
        ({"alpha_pattern": {"q_proj": 64}}, {}, "adapter_config.json has alpha_pattern = {'q_proj': 64}"),
        ({"rank_pattern": {"q_proj": 2}}, {}, "has rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, {}, "has modules_to_save"),
        ({"lora_bias": True}, {}, "has lora_bias"),
        ({"bias": "all"}, {}, "has bias = 'all'"),
        ({"use_dora": True}, {}, "has use_dora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, {}, "has layer_replication"),
        ({"init_lora_weights": "pissa"}, {}, "has init_lora_weights = 'pissa'"),
        ({"of_next_year": {"x": 1}}, {}, "has of_next_year"),
        ({"peft_type": "LOHA"}, {}, "not LOHA"),
        ({"r": 0}, {}, "r = 0"),
        ({"r": 8}, {}, r"expected \[8, in\] and \[out, 8\]"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(5, 32)}, r"factors \[5, 32\] and \[32, 4\]"),
        ({}, {f"{Q}.lora_B.bias": torch.ones(32)}, "lora_B.bias is no factor"),
        ({}, {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "lm_head.weight is no factor"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)}, "is no factor"),
        ({}, {"base_model.model.x.lora_B.weight": torch.ones(2, 4)}, "and no lora_A.weight beside it"),
        ({}, {f"{Q}.lora_B.weight": torch.full((32, 4), torch.nan)}, "q_proj.weight would not be finite"),
    ],
)  # fmt: skip
def test_nothing_of_an_adapter_is_left_out(config, tensors, why, model_folder, tmp_path):  # noqa: F811
    source = model_folder()
    state = load_file(source / "model.safetensors")
    peft_folder(tmp_path / "adapter", of_layers(state, "q_proj"), tensors=tensors, **config)
    with pytest.raises(Act24Error, match=why) as refused:
        merge(str(source), tmp_path / "out", tmp_path / "adapter")
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "target"), [("gpt2", "c_attn"), ("llama", "down_proj")])
def test_what_peft_trained_is_merged_as_peft_has_it(kind, target, model_folder, tmp_path):  # noqa: F811
    peft = pytest.importorskip("peft")
    source = model_folder(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    asked = peft.LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM", use_rslora=True)
    adapted = peft.get_peft_model(model, asked).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(str(source), tmp_path / "merged", tmp_path / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-5)
