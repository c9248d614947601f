"""Folders of run_c4.py, written here by modules that are its own in a few lines: act24 computes the same."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from slow import slow_but
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import act24
from act24.errors import Act24Error
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.recipes.schema import Data, Tokenizer
from act24.tools.commands.run_c4 import run
from act24.tools.data import open_tokenizer
from act24.tools.huggingface.export import export_run

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
IDS = torch.arange(48).view(4, 12)
RANK = 8


class OldLowRank(nn.Module):
    """y = x N Mᵀ, N `[in, r]` and M `[out, r]`; CoLA has a SiLU in between."""

    def __init__(self, linear: nn.Linear, silu: bool = False) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(0.3 * torch.randn(linear.in_features, RANK))
        self.weight_out = nn.Parameter(0.3 * torch.randn(linear.out_features, RANK))
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        inner = x @ self.weight_in
        return (F.silu(inner) if self.silu else inner) @ self.weight_out.T


class OldLost(nn.Module):
    """γ · low rank + (1 - γ) · kept columns + bias; no SiLU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        kept = max(1, int(0.25 * linear.in_features))
        self.lowrank_module = OldLowRank(linear)
        self.values = nn.Parameter(0.1 * torch.randn(linear.out_features, kept))
        self.bias = nn.Parameter(0.1 * torch.randn(linear.out_features))
        self.register_buffer("selected_col_indices", torch.randperm(linear.in_features)[:kept].sort().values)
        self.register_buffer("gamma", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        columns = x[..., self.selected_col_indices] @ self.values.T
        return self.gamma * self.lowrank_module(x) + (1 - self.gamma) * columns + self.bias


class OldMLP(nn.Module):
    """No gate, F = int(1.5 I)."""

    def __init__(self, config: LlamaConfig, sparse: bool) -> None:
        super().__init__()
        width = int(1.5 * config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.sparse = sparse

    def forward(self, x: Tensor) -> Tensor:
        activation = self.up_proj(x).relu().square()
        if self.sparse:
            groups = activation.unflatten(-1, (-1, 4))
            kept = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1.0)
            activation = (groups * kept).flatten(-2)
        return self.down_proj(activation)


def old_model(method: str, relu2: bool = False, sparse: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG)
    for layer in model.model.layers:
        if relu2:
            layer.mlp = OldMLP(CONFIG, sparse)
        for block, parent in (("attn", layer.self_attn), ("mlp", layer.mlp)):
            for name, linear in list(parent.named_children()):
                if method in ("loro", "cola"):
                    # The old code computed CoLA's network without its SiLU under 2:4 activations.
                    silu = method == "cola" and not (sparse and block == "mlp")
                    setattr(parent, name, OldLowRank(linear, silu))
                elif method == "lost":
                    setattr(parent, name, OldLost(linear))
    return model


def write(
    folder: Path, model: nn.Module, flags: dict[str, Any] | None, kind: str = "bin", **config: Any
) -> Path:
    """As the old code saved: save_pretrained of an old or a newer transformers, and optimizer.pt."""
    folder.mkdir(parents=True)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    content = {
        "model_type": "llama",
        "hidden_act": "silu",
        "pad_token_id": -1,
        "rms_norm_eps": 1e-6,
        **config,
    }
    content |= {name: getattr(CONFIG, name) for name in fields}
    (folder / "config.json").write_text(json.dumps(content))
    state = model.state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(state, folder / "model.safetensors")
    if flags is not None:
        saved = {
            "config": {**flags, "model": content, "world_size": 1, "device": "cuda:0"},
            "update_step": 40,
        }
        torch.save({**saved, "optimizer": {"state": {}}, "dtype": "float32"}, folder / "optimizer.pt")
    (folder / "training_state.json").write_text(json.dumps({"update_step": 40, "global_step": 80}))
    return folder


#: vars(args), with lr renamed; the rest has the script's defaults.
FLAGS = {
    "batch_size": 4,
    "total_batch_size": 8,
    "max_lr": 0.01,
    "dtype": "float32",
    "loro_scope": "all",
    "loro_attn_rank": RANK,
    "loro_mlp_rank": RANK,
    "num_training_steps": 100,
    "warmup_steps": 10,
    "model_config": "configs/llama_9m.json",
    "tags": None,
    "single_gpu": False,
}
RELU2 = {
    "squ_relu": "relu2",
    "activation_2by4": True,
    "activation_dense_warmup_steps": 20,
    "dx_direct_sparse": 3,
}
CASES = {
    "dense": ("dense", {"optimizer": "adamw"}),
    "dense, relu2, 2:4": ("dense", {"optimizer": "adamw", **RELU2}),
    "LORO": ("loro", {"optimizer": "loro_adamw"}),
    "LORO, relu2, 2:4": ("loro", {"optimizer": "loro_adamw", **RELU2}),
    "CoLA": ("cola", {"optimizer": "cola_adamw"}),
    "CoLA, relu2, 2:4": ("cola", {"optimizer": "cola_adamw", **RELU2}),
    "LoST": ("lost", {"optimizer": "lost_adamw", "lost_sparsity": 0.25, "lost_gamma": 0.7}),
}


def case(name: str, folder: Path, kind: str = "bin") -> tuple[Path, LlamaForCausalLM]:
    method, flags = CASES[name]
    relu2 = "squ_relu" in flags
    model = old_model(method, relu2, relu2)
    more = {"squ_relu": flags.get("squ_relu", "silu")}
    return write(folder, model, {**FLAGS, **flags}, kind, **more), model


@pytest.mark.parametrize("kind", slow_but(("safetensors",), ["bin", "safetensors"]))
@pytest.mark.parametrize("name", CASES)
def test_the_function_is_the_old_model_s(name: str, kind: str, tmp_path: Path) -> None:
    folder, model = case(name, tmp_path / "model_40", kind)
    built = act24.load(folder)
    assert built.step == 40
    torch.testing.assert_close(built.model.eval()(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert built.recipe.optimizer.lr == 0.01


@pytest.mark.parametrize("name", slow_but(("LORO", "LoST"), ["LORO", "CoLA", "LoST", "dense, relu2, 2:4"]))
def test_it_is_exported_for_transformers(name: str, tmp_path: Path) -> None:
    folder, model = case(name, tmp_path / "model_40")
    (tmp_path / "text.txt").write_text("low rank and two of four " * 200)
    data = Data(source="files", train_files=(str(tmp_path / "text.txt"),))
    (folder / "tokenizer.json").write_text(open_tokenizer(data, Tokenizer(vocab_size=257)).to_json())
    form = "act24" if name == "dense, relu2, 2:4" else "auto"
    export_run(folder, tmp_path / "out", form)
    import act24.tools.huggingface.model_type  # noqa: F401

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-5)


def test_flags_may_stand_in_a_file(tmp_path: Path) -> None:
    model = old_model("cola")
    folder = write(tmp_path / "model_40", model, None)
    with pytest.raises(
        Act24Error, match=r"do not tell LORO from CoLA\. Write the run_c4.py command, as a line, into .*txt"
    ):
        act24.load(folder)
    (folder / "command.txt").write_text(
        "torchrun run_c4.py --model_config configs/llama_9m.json --batch_size 4 --dtype float32 \\\n"
        f"  --optimizer cola_adamw --loro_scope all --loro_attn_rank {RANK} --loro_mlp_rank {RANK}\n"
    )
    torch.testing.assert_close(act24.load(folder).model(IDS), model(IDS), rtol=1e-4, atol=1e-5)


def test_rotary_settings_that_the_old_model_did_not_read_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = old_model("dense")
    flags = {**FLAGS, "optimizer": "adamw"}
    own = act24.load(write(tmp_path / "own", model, flags, "bin", rope_theta=50000.0))
    torch.testing.assert_close(own.model.eval()(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert "rope_theta 50000 in its config.json is not used" in caplog.text
    theirs = write(tmp_path / "theirs", model, {**flags, "use_hf_model": True}, "bin", rope_theta=50000.0)
    assert act24.load(theirs).recipe.model.rope_theta == 50000


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt"])
def test_nothing_in_a_pickle_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, _ = case("LORO", tmp_path / "model_40")
    torch.save({"config": Evil(), "x": Evil()}, folder / name)
    with pytest.raises(Act24Error, match=f"cannot read .*{name} without running code"):
        act24.load(folder)
    (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Act24Error, match="cannot read"):
        act24.load(folder)
    (folder / name).write_bytes(b"")
    with pytest.raises(Act24Error, match="cannot read"):
        act24.load(folder)
    assert not (tmp_path / "ran").exists()


def test_another_rank_is_refused_by_name(tmp_path: Path) -> None:
    model = old_model("loro")
    folder = write(tmp_path / "model_40", model, {**FLAGS, "optimizer": "loro_adamw", "loro_attn_rank": 4})
    with pytest.raises(Act24Error, match=r"of another shape: .*q_proj.weight_in \[8, 32\] for \[4, 32\]"):
        act24.load(folder)


class OldOverlay(nn.Module):
    """LORO's factors, each soft-thresholded to 2:4 along its last axis and scaled, in every forward."""

    def __init__(self, loro_linear: OldLowRank) -> None:
        super().__init__()
        self.loro_linear = loro_linear
        self.register_buffer("sparse_scale_in", torch.tensor(1.7))
        self.register_buffer("sparse_scale_out", torch.tensor(1.4))
        self.register_buffer("previous_mask", torch.ones(8))

    @staticmethod
    def soft(weight: Tensor, scale: Tensor) -> Tensor:
        groups = weight.unflatten(-1, (-1, 4))
        ordered = groups.abs().sort(-1, descending=True).values
        return (groups.sign() * (groups.abs() - ordered[..., 2:3]).clamp(min=0)).flatten(-2) * scale

    def forward(self, x: Tensor) -> Tensor:
        inner = x @ self.soft(self.loro_linear.weight_in, self.sparse_scale_in)  # type: ignore[arg-type]
        return inner @ self.soft(self.loro_linear.weight_out.T, self.sparse_scale_out)  # type: ignore[arg-type]


@pytest.mark.parametrize("eucl", [False, True])
def test_factors_that_were_2_4_are_read_as_they_were_multiplied(
    eucl: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = old_model("loro")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                setattr(parent, name, OldOverlay(child))
    flags = {**FLAGS, "optimizer": "loro_adamw", "enable_2to4_sparse": True, "attn_2by4": True}
    kind = {"loro_type": "eucl"} if eucl else {"loro_type": "loro", "loro_freq": 10}
    folder = write(tmp_path / "model_40", model, {**flags, **kind})
    built = act24.load(folder)
    torch.testing.assert_close(built.model(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert [p.name for p in built.pipeline.passes] == ["low_rank"]
    assert "2:4 along the rank" in caplog.text


class OfficialCola(nn.Module):
    """y = silu(x A) B + bias, as its authors have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.cola_a = nn.Parameter(0.3 * torch.randn(linear.in_features, RANK))
        self.cola_b = nn.Parameter(0.3 * torch.randn(RANK, linear.out_features))
        self.bias = nn.Parameter(0.1 * torch.randn(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x @ self.cola_a) @ self.cola_b + self.bias


class OfficialColaMLP(nn.Module):
    def __init__(self, mlp: Any, silu: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = OfficialCola(mlp.gate_proj), OfficialCola(mlp.up_proj)
        self.down_proj, self.silu = OfficialCola(mlp.down_proj), silu

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj((F.silu(gate) if self.silu else gate) * self.up_proj(x))


def named_by_cola_m(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What CoLA-M's modules call it: each is a part that is computed anew in backward, and reaches from the
    second factors of some linears to the first ones of others."""
    places = {
        **{f"self_attn.{x}_proj": (f"pre_attn.pre_{x}_proj", f"self_attn.post_{x}_proj") for x in "qkv"},
        "self_attn.o_proj": ("self_attn.pre_o_proj", "post_attn.post_o_proj"),
        "mlp.gate_proj": ("pre_mlp.pre_gate_proj", "self_mlp.post_gate_proj"),
        "mlp.up_proj": ("pre_mlp.pre_up_proj", "self_mlp.post_up_proj"),
    }
    named = {}
    for name, value in state.items():
        head, _, leaf = name.rpartition(".")
        _, _, layer, *inside = head.split(".") if ".layers." in head else ("", "", "")
        linear = ".".join(inside)
        if linear in places:
            head = f"model.layers.{layer}.{places[linear][leaf != 'cola_a']}"
        elif linear == "mlp.down_proj" and leaf == "cola_a":
            head = f"model.layers.{layer}.self_mlp.pre_down_proj"
        elif linear == "mlp.down_proj":  # of the first of two layers
            head = "model.layers.1." + ("post_mlp" if layer == "1" else "last_layer_post_mlp")
            head += ".post_down_proj"
        named[f"{head}.{leaf}"] = value
    return named


@pytest.mark.parametrize(
    ("silu", "colam"), slow_but([(True, True)], [(False, False), (True, False), (True, True)])
)
def test_a_folder_of_the_code_published_with_cola(silu: bool, colam: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG)
    for layer in model.model.layers:
        layer.mlp = OfficialColaMLP(layer.mlp, silu)
        for name, linear in list(layer.self_attn.named_children()):
            setattr(layer.self_attn, name, OfficialCola(linear))
    told = {"only_lr_act": False, "rank": RANK} if silu else {}  # 32 / 4 is the rank that is meant
    options = {"model_type": "cola", "attention_bias": True, "mlp_bias": True, **told}
    folder = write(tmp_path / "model_40", model, None, "safetensors", **options)
    if colam:
        named = named_by_cola_m(safetensors.torch.load_file(folder / "model.safetensors"))
        assert len(named) == len(model.state_dict()) + 1
        safetensors.torch.save_file(named, folder / "model.safetensors")
    torch.testing.assert_close(act24.load(folder).model(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    export_run(folder, tmp_path / "out", "act24")
    from act24.tools.huggingface import model_type  # noqa: F401  (registers it)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-5)


def test_a_command_goes_on_from_it(tiny_file: Path, tmp_path: Path) -> None:
    """`--continue_from`, with a learning rate of nearly nothing: the weights are the old ones."""
    folder, model = case("LORO", tmp_path / "model_40")
    words = (
        f"--model_config {folder}/config.json --batch_size 4 --dtype float32 --optimizer loro_adamw "
        f"--lr 1e-9 --loro_scope all --loro_attn_rank {RANK} --loro_mlp_rank {RANK} --num_training_steps 2 "
        f"--warmup_steps 0 --scheduler const --loro_freq 500 "
        f"--train_data_path {tiny_file.parent}/train-*.txt "
        f"--val_data_path {tiny_file.parent}/heldout.txt --max_length 16 "
        f"--continue_from {folder} --save_dir {tmp_path}/run"
    ).split()
    settings = ["tokenizer.name=bpe", "tokenizer.vocab_size=300", "model.vocab_size=300"]
    with pytest.raises(Act24Error, match="of another shape"):
        run([*words, "--", *(f"--set={setting}" for setting in settings)])
    small = ["tokenizer.name=" + str(_tokenizer(tmp_path)), "eval.tokens=100"]
    run([*words, "--", *(f"--set={setting}" for setting in small)])
    assert json.loads((tmp_path / "run" / "history.jsonl").read_text())["weights"] == str(folder)
    torch.testing.assert_close(act24.load(tmp_path / "run").model(IDS), model(IDS), rtol=1e-4, atol=1e-5)


def _tokenizer(folder: Path) -> Path:
    """One of few words, whose ids a vocabulary of 97 has."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<eos>",
        "<unk>",
        "low",
        "rank",
        "sparse",
        "two",
        "of",
        "four",
        "tokens",
        "graph",
        "pass",
        "relu",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>", "<unk>"])
    path = folder / "words.json"
    tokenizer.save(str(path))
    return path
