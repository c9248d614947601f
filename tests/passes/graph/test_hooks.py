"""Hooks: refused where a rewrite would lose them, kept and called everywhere else."""

from __future__ import annotations

import pytest
from toys import SwiGLU, Trunk, features, fingerprint, llama, tokens

from act24.passes import PassError, Relu2FFN, apply_

HOOKS = {
    "register_forward_hook": lambda *_: None,
    "register_forward_pre_hook": lambda *_: None,
    "register_full_backward_hook": lambda *_: None,
    "register_full_backward_pre_hook": lambda *_: None,
    "register_state_dict_post_hook": lambda *_: None,
    "register_load_state_dict_pre_hook": lambda *_: None,
}


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_inside_a_region_are_refused_by_name(register: str) -> None:
    model = llama()
    handle = getattr(model.model.layers[1].mlp.up_proj, register)(HOOKS[register])
    before = fingerprint(model)
    with pytest.raises(PassError, match=r"model\.layers\.1\.mlp\.up_proj has a hook"):
        apply_(model, [Relu2FFN()])
    assert fingerprint(model) == before
    handle.remove()
    apply_(model, [Relu2FFN()])


def test_a_leaf_keeps_its_hooks() -> None:
    model = llama()
    seen = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: seen.append(1))
    apply_(model, [Relu2FFN()])
    model(tokens())
    assert seen == [1]


def test_hooks_outside_what_is_rewritten_are_welcome() -> None:
    model = Trunk(SwiGLU)
    seen = []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.blocks[1].register_forward_hook(lambda *_: seen.append("block"))
    apply_(model, [Relu2FFN(targets=("blocks.0.*",))])
    model(features(2, 16))
    assert seen == ["block", "model"]


def test_hooks_on_what_stands_afterwards_work() -> None:
    model = Trunk(SwiGLU)
    apply_(model, [Relu2FFN()])
    seen = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model(features(2, 16))
    assert seen == [1]


def test_a_sharded_model_is_told_to_take_passes_first() -> None:
    """As fully_shard does it, which needs processes: a class between the module's own and its name."""
    sharding = type("FSDPModule", (), {"__module__": "torch.distributed.fsdp"})
    model = Trunk(SwiGLU)
    model.blocks[0].mlp.__class__ = type("FSDPSwiGLU", (sharding, SwiGLU), {})
    with pytest.raises(PassError, match=r"blocks\.0\.mlp \[FSDPSwiGLU\] is sharded: apply the passes first"):
        apply_(model, [Relu2FFN()])
