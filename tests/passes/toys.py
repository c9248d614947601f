"""Small models, and a pass, that nobody at act24 wrote: what a user's code may look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.passes import Match, Pipeline, Plan, Region, StateMap, trace
from act24.passes.base import StructuralPass
from act24.passes.graph.normal_form import bias_name, nodes_of, weight_name
from act24.passes.graph.region import ParameterSpec


def llama(layers: int = 2, seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A stock LLaMA of width 32, F 48 and 97 words."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": layers, **overrides})  # type: ignore[arg-type]
    return build_llama(config, seed)


def tokens(batch: int = 2, sequence: int = 9, seed: int = 0) -> Tensor:
    """Random token ids for `llama`."""
    return torch.randint(97, (batch, sequence), generator=torch.Generator().manual_seed(seed))


class SwiGLU(nn.Module):
    def __init__(self, width: int = 16, inner: int = 32, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Relu2MLP(nn.Module):
    """linear → relu² → linear, with a dropout behind it that has to follow `.eval()`."""

    def __init__(self, width: int = 16, inner: int = 32, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.relu(self.up(x)).square()))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Trunk(nn.Module):
    """Blocks around the modules that `make` gives."""

    def __init__(self, make: Callable[[], nn.Module], layers: int = 2, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(make(), width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def features(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two linears; subclasses say what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)


def stand(model: nn.Module) -> nn.Module:
    """The model with every region standing as a graph module."""
    Pipeline(model, [], keep_all=True).commit_()
    return model


def regions(model: nn.Module) -> dict[str, str]:
    """Name to class of every region."""
    return {fqn: type(r.module).__name__ for r in trace(model)[0] for fqn in r.fqns}


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Modules, parameters and buffers by identity, and their values."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [*modules, *((name, id(t), t.detach().clone().tolist()) for name, t in tensors.items())]


@dataclass(frozen=True, kw_only=True)
class Doubled(StructuralPass):
    """`linear(x, W) ==> linear(x, H) + linear(x, H)` with H = W / 2: a pass whose way back is exact."""

    name: ClassVar[str] = "doubled"

    def plan(self, region: Region) -> Plan:
        matches = []
        for node in nodes_of(region.graph, F.linear):
            name = weight_name(node) or ""
            path = name.rpartition(".")[0]
            if name.endswith("weight") and bias_name(node) is None and self.selects(region, path):
                spec = region.parameters[name]
                half = f"{path}.halved" if path else "halved"
                matches.append(
                    Match(
                        path=path,
                        before="linear",
                        after="linear twice",
                        nodes=(node, name, half),
                        parameters_before=spec.numel(),
                        parameters_after=spec.numel(),
                        state=StateMap(
                            removes=(name,),
                            creates=(half,),
                            from_stock=lambda old, n=name, h=half: {h: old[n] / 2},
                            to_stock=lambda new, n=name, h=half: {n: new[h] * 2},
                            exact=True,
                        ),
                    )
                )
        return Plan(tuple(matches), absent="no linear without bias")

    def _rewrite(self, region: Region, match: Match) -> None:
        node, name, half = match.nodes
        spec = region.parameters[name]
        region.create(
            {half: ParameterSpec(spec.shape, spec.dtype, spec.device)},
            lambda old, generator: {half: old[name] / 2},
            replaces=(name,),
        )
        with region.graph.inserting_after(node):
            total = region.graph.call_function(torch.mul, (node, 2))
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        with region.graph.inserting_before(node):
            weight = region.graph.get_attr(half)
        old = node.args[1]
        node.args = (node.args[0], weight, node.args[2])
        if not old.users:
            region.graph.erase_node(old)
