"""A `run_c4.py` command: the value of every option, and which branch of that script it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from act24.optim import ColaAdamWOptions, LOROAdamWOptions, LostAdamWOptions

_METHODS = {o.name: o.needs for o in (LOROAdamWOptions, ColaAdamWOptions, LostAdamWOptions)}

#: The values of `--optimizer` that act24 has something for.
OPTIMIZERS = ("adam", "adamw", *_METHODS)


@dataclass(frozen=True)
class Command:
    """The value of every option, and which were given. Options are attributes too: `command.lr`."""

    values: dict[str, Any]
    given: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def method(self) -> str:
        """The low-rank pass, or the empty string: without a scope all layers stay dense."""
        return _METHODS.get(self.optimizer, "") if self.loro_scope not in (None, "None") else ""

    @property
    def dense_ffn(self) -> bool:
        """Whether SwiGLU stays."""
        return self.squ_relu == "silu" or self.use_hf_model

    @property
    def sparse_activations(self) -> bool:
        return self.activation_2by4 and self.squ_relu == "relu2" and not self.use_hf_model

    @property
    def exact_steps(self) -> bool:
        return self.optimizer == "loro_adamw" and bool(self.method) and self.loro_type != "eucl"

    @property
    def refreshes(self) -> bool:
        """Whether LORO's moments are zeroed now and then."""
        return self.loro_refresh not in (None, "None") and self.loro_refresh_freq > 0

    @property
    def weights24(self) -> tuple[str, ...]:
        """The linears whose weights run_c4.py made 2:4, `attn` and `mlp`: LORO's are those with factors."""
        if not self.enable_2to4_sparse or self.use_hf_model:
            return ()
        factors = {"all": ("attn", "mlp")}.get(self.loro_scope, (self.loro_scope,))
        reached = {"adamw": ("attn", "mlp"), "loro_adamw": factors if self.method else ()}
        asked = {"attn": self.attn_2by4, "mlp": self.mlp_2by4}
        return tuple(kind for kind in reached.get(self.optimizer, ()) if asked[kind])

    @property
    def sparse_inputs(self) -> bool:
        """Whether run_c4.py made the inputs of these linears 2:4 in place of their weights."""
        return self.optimizer == "adamw" and self.activation_2by4

    @property
    def sparse_weights(self) -> bool:
        """Whether run_c4.py had 2:4 weights, and they can be had."""
        return bool(self.weights24) and not self.sparse_inputs and not self.exact_steps

    @property
    def bottleneck(self) -> str:
        """The activation between the factors of CoLA and LoST.

        LoST has its SiLU, as its author describes it, unless the command says that it has none.
        """
        if self.more_activation_relu2:
            return "relu2"
        return "none" if self.method == "lost" and self.says("cola_silu", False) else "silu"

    @property
    def warms_up_from_zero(self) -> bool:
        return self.scheduler in ("linear", "cosine", "cosine_restart_zero") and self.warmup_steps > 0

    def says(self, name: str, value: Any) -> bool:
        """Whether an option was given with this value."""
        return name in self.given and self.values[name] == value
