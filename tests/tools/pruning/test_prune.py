"""The driver against the published definition, computed independently on small random models."""

import pytest
import torch
import transformers

from act24 import LlamaForCausalLM, llama_config
from act24.errors import Act24Error
from act24.initialise import initialise_
from act24.tools.pruning.blocks import Chain
from act24.tools.pruning.prune import prune_

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def rows(count=4, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 97, (count, length), generator=generator).split(2))


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"tie_word_embeddings": True} | changes)
    return transformers.LlamaForCausalLM(config).eval()


def published_wanda_(model, ids, prune_row):
    """Layer by layer as the paper has it, by hooks, through whole forwards of the model so far: inputs of
    block i are those of the model whose blocks before it are pruned and whose block i is dense."""
    masks = {}
    for index, block in enumerate(model.model.layers):
        seen, handles = {}, []
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, out, name=name, seen=seen: seen.setdefault(name, []).append(
                            args[0].double()
                        )
                    )
                )
        with torch.no_grad():
            for batch in ids:
                model(batch)
        for handle in handles:
            handle.remove()
        for name, inputs in seen.items():
            weight = block.get_submodule(name).weight
            norm = torch.cat([x.flatten(0, 1) for x in inputs]).norm(dim=0)
            score = weight.detach().double().abs() * norm
            mask = torch.stack([prune_row(row) for row in score])
            with torch.no_grad():
                weight[~mask] = 0
            masks[f"model.layers.{index}.{name}.weight"] = mask
    return masks


def half(row):
    return row >= row.sort().values[len(row) // 2]


def two_of_four(row):
    return torch.cat([group >= group.sort().values[2] for group in row.split(4)])


@pytest.mark.parametrize(("pattern", "rule"), [("0.5", half), ("2:4", two_of_four)])
def test_wanda_is_the_published_definition(pattern, rule):
    ours, theirs = llama(), llama()
    done = prune_(ours, rows(), method="wanda", pattern=pattern)
    expected = published_wanda_(theirs, rows(), rule)
    assert done.masks.keys() == expected.keys()
    assert len(expected) == 21
    for name, mask in expected.items():
        assert torch.equal(done.masks[name], mask), name
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name  # what is no block's linear too


def test_statistics_pass_the_pruned_blocks():
    """T4: without propagation the masks of later blocks are others."""
    done = prune_(llama(), rows(), method="wanda", pattern="0.5")
    model, alone = llama(), {}
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    for index in range(3):
        model.load_state_dict(dense)
        one = prune_(model, rows(), pattern="0.5", by_layer={f"model.layers.{index}.*": "0.5", "*": "dense"})
        alone |= one.masks
    first = [name for name in done.masks if ".layers.0." in name]
    later = [name for name in done.masks if ".layers.0." not in name]
    assert all(torch.equal(done.masks[name], alone[name]) for name in first)
    assert not all(torch.equal(done.masks[name], alone[name]) for name in later)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_batches_and_padding_do_not_matter(method):
    ids = torch.cat(rows(6, 10))
    masks = prune_(llama(), [ids], method=method).masks
    again = prune_(llama(), list(ids.split(1)), method=method).masks
    differ = sum(int((masks[n] != again[n]).sum()) for n in masks) / sum(m.numel() for m in masks.values())
    assert differ < 0.005  # sums in another order
    padded = torch.cat((ids, torch.full((6, 5), 7)), dim=1)
    pads = torch.zeros_like(padded, dtype=torch.bool)
    pads[:, 10:] = True
    with_pads = prune_(llama(), [padded], pads=[pads], method=method).masks
    differ = sum(int((masks[n] != with_pads[n]).sum()) for n in masks) / sum(
        m.numel() for m in masks.values()
    )
    assert differ < 0.005
    if method != "magnitude":
        counted = prune_(llama(), [padded], method=method).masks
        assert any(not torch.equal(counted[n], masks[n]) for n in masks)


CONFIGS = {
    "qwen2, biases": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "mistral, window": transformers.MistralConfig(**SIZES, sliding_window=4),
    "gpt2, Conv1D": transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_other_models(kind, method):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = []
    done = prune_(model, rows(), method=method, pattern="2:4", say=lines.append)
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        and "head" not in name
        and "embed_out" not in name
    }
    assert done.masks.keys() == linears.keys()
    assert not done.left
    assert len(lines) == len({layer.rsplit(".", 1)[0] for layer in done.block_errors}) * len(
        done.block_errors
    )
    for name, mask in done.masks.items():
        conv = isinstance(linears[name], transformers.pytorch_utils.Conv1D)
        assert (name in done.transposed) is conv
        weight = linears[name].weight.detach()
        inputs = weight.T if conv else weight  # [out, in]
        zeros = (inputs == 0).unflatten(1, (-1, 4)).sum(-1)
        assert (zeros == 2).all()
        assert torch.equal(weight != 0, mask)
    untouched = before.keys() - done.masks.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in untouched)


def test_conv1d_is_pruned_as_the_linear_that_it_is():
    """By the inputs, with their statistics: against a hook on the module."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2, Conv1D"]).eval()
    module, seen = model.transformer.h[0].mlp.c_proj, []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0].double().flatten(0, 1)))
    for batch in rows():
        model(batch)
    handle.remove()
    score = module.weight.detach().T.double().abs() * torch.cat(seen).detach().norm(dim=0)
    expected = torch.stack([half(row) for row in score]).detach()
    done = prune_(model, rows(), pattern="0.5")
    found = done.masks["transformer.h.0.mlp.c_proj.weight"].T
    assert (found != expected).sum() == 0, (found != expected).nonzero()


def test_the_stock_model_and_transformers_get_the_same_masks():
    theirs = llama()
    ours = LlamaForCausalLM(llama_config("llama-9m", **SIZES, tie_word_embeddings=True))
    ours.load_state_dict({n: v for n, v in theirs.state_dict().items() if n != "lm_head.weight"})
    one, other = prune_(ours, rows(), pattern="0.5"), prune_(theirs, rows(), pattern="0.5")
    assert one.masks.keys() == other.masks.keys()
    total = sum(m.numel() for m in one.masks.values())
    assert sum(int((one.masks[n] != other.masks[n]).sum()) for n in one.masks) / total < 0.002


def test_the_report_says_what_happened():
    model = llama()
    dense = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda m, a, o: seen.append(a[0].flatten(0, 1))
    )
    for batch in rows():
        model(batch)
    handle.remove()
    done = prune_(model, rows(), pattern="2:4")
    layer = next(x for x in done.layers if x.name == "model.layers.0.mlp.down_proj.weight")
    x, pruned = torch.cat(seen).detach(), model.model.layers[0].mlp.down_proj.weight.detach()
    assert layer.sparsity == 0.5
    assert layer.error == pytest.approx(
        float((x @ (dense - pruned).T).norm() / (x @ dense.T).norm()), rel=1e-4
    )
    score = dense.abs() * x.norm(dim=0)
    assert layer.score_kept == pytest.approx(float((score * (pruned != 0)).sum() / score.sum()), rel=1e-4)
    assert done.sparsity == 0.5
    assert not model.training


def test_a_table_gives_layers_patterns_of_their_own():
    table = {"*.q_proj": "dense", "model.layers.0.*": "0.25", "class:Linear": "4:8"}
    done = prune_(llama(), rows(), by_layer=table)
    assert done.left.keys() == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}
    for layer in done.layers:
        assert (layer.sparsity, layer.pattern) == ((0.25, "0.25") if ".0." in layer.name else (0.5, "4:8"))


def test_a_table_takes_what_lies_below_what_it_names():
    """As targets and ignore of passes do: containers, their classes, and whole blocks."""
    table = {"*.self_attn": "dense", "model.layers.0": "0.25", "class:LlamaMLP": "4:8", r"re:.*\.2": "1:4"}
    with pytest.raises(Act24Error, match=r"by_layer: 're:.*' takes only linears that a selector before"):
        prune_(llama(), rows(), by_layer=table)
    done = prune_(llama(), rows(), by_layer=dict(list(table.items())[:3]))
    assert {name.split(".")[3] for name in done.left} == {"self_attn"}
    assert len(done.left) == 3 * 4
    for layer in done.layers:
        assert layer.pattern == ("0.25" if ".0." in layer.name else "4:8")


def test_experts_stay_dense_and_are_said_to():
    """`transformers` keeps them in one tensor; what chooses among them is not pruned either."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    done = prune_(transformers.AutoModelForCausalLM.from_config(config), rows())
    left = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert done.left.keys() == {f"model.layers.{i}.{leaf}" for i in range(3) for leaf in left}
    attention = sum(mask.numel() for mask in done.masks.values())
    experts, router = 4 * 3 * 32 * 48, 4 * 32
    assert len(done.masks) == 4 * 3
    assert done.sparsity_of_blocks == 0.5 * attention / (attention + 3 * (experts + router))
    assert done.as_dict()["sparsity_of_blocks"] == done.sparsity_of_blocks


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)

    def forward(self, hidden, of_tokens=None):
        return hidden + torch.tanh(self.linear(hidden) * of_tokens)


class Gated(torch.nn.Module):
    """Blocks that see the tokens beside the hidden states, as Gemma 4's do."""

    def __init__(self):
        super().__init__()
        self.embed, self.gates = torch.nn.Embedding(97, 32), torch.nn.Embedding(97, 32)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden, of_tokens=self.gates(ids))
        return hidden


def test_what_blocks_are_called_with_is_of_each_batch():
    model, batches = Gated(), rows(count=6)
    chain = Chain(model, batches, [None] * 3, torch.device("cpu"))
    for index in range(2):
        chain.advance(index)
    for number, ids in enumerate(batches):
        with torch.no_grad():
            torch.testing.assert_close(chain.inputs(number), model(ids))


class Store:
    def __init__(self):
        self.blocks, self.stop_at = {}, None

    def load(self, index):
        return self.blocks.get(index)

    def save(self, index, weights, done):
        if index == self.stop_at:
            raise KeyboardInterrupt
        self.blocks[index] = {name: value.clone() for name, value in weights.items()}, done


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_interrupted_pruning_goes_on_to_the_same_masks(method):
    whole = llama()
    expected = prune_(whole, rows(), method=method)
    store = Store()
    store.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        prune_(llama(), rows(), method=method, kept=store)
    assert sorted(store.blocks) == [0, 1]
    store.stop_at, lines, model = None, [], llama()
    done = prune_(model, rows(), method=method, kept=store, say=lines.append)
    assert [("found finished" in line) for line in lines] == [True, True, False]
    assert all(torch.equal(done.masks[name], mask) for name, mask in expected.masks.items())
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_bad_input_is_one_line_and_changes_nothing():
    def refused(match, model=None, batches=None, **options):
        model = model or llama()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(Act24Error, match=match):
            prune_(model, rows() if batches is None else batches, **options)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) or value.isnan().any()

    refused("there is no pruning method named 'wand'", method="wand")
    refused("write the share that goes", pattern="3")
    refused(r"q_proj.weight: pattern 3:7 needs .* multiple of 7", pattern="3:7")
    refused("needs calibration rows", batches=[])
    refused("wanda_cumulative .* give a share", method="wanda_cumulative", by_layer={"*.layers.0.*": "0.5"})
    refused("no linear was pruned", by_layer={"*": "dense"})
    refused("begins with no known prefix", by_layer={"clas:x": "dense"})
    refused("no list of blocks", model=torch.nn.Sequential(torch.nn.Linear(4, 4)))
    broken = llama()
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    refused("layers.0.mlp.up_proj.weight is not finite|inputs are not finite", model=broken)
    shared = llama()
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    refused("a shared matrix cannot be pruned", model=shared)
    refused(
        "encoder beside",
        model=transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
    )


def test_initial_weights_of_a_relu2_model_are_found_through_the_graph():
    from act24.passes import Relu2FFN, apply_

    model = LlamaForCausalLM(llama_config("llama-9m", **SIZES))
    initialise_(model, 0)
    apply_(model, [Relu2FFN()])
    done = prune_(model, rows())
    assert len(done.masks) == 3 * 6  # q k v o up down
    assert not done.left
