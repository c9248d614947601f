"""Hooks: refused where a rewrite would lose them, kept and called everywhere else."""

from __future__ import annotations

import importlib
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from toys import SwiGLU, Trunk, features, fingerprint, llama, tokens

from act24.passes import LowRank, PassError, Pipeline, Relu2FFN, Weight24, apply_, plan

HOOKS = {
    "register_forward_hook": lambda *_: None,
    "register_forward_pre_hook": lambda *_: None,
    "register_full_backward_hook": lambda *_: None,
    "register_full_backward_pre_hook": lambda *_: None,
    "register_state_dict_post_hook": lambda *_: None,
    "register_load_state_dict_pre_hook": lambda *_: None,
}


FIRST = "model.layers.0.mlp"


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_inside_a_region_are_refused_by_name(register: str) -> None:
    model = llama()
    handle = getattr(model.model.layers[1].mlp.up_proj, register)(HOOKS[register])
    before = fingerprint(model)
    with pytest.raises(PassError, match=r"model\.layers\.1\.mlp\.up_proj has a hook") as refused:
        apply_(model, [Relu2FFN()])
    assert fingerprint(model) == before
    if "leave that one out" in str(refused.value):
        ignore = tuple(re.findall(r'"(\S+)"', str(refused.value)))
        assert {row.fqn for row in Pipeline(model, [Relu2FFN(ignore=ignore)]).report.rows} == {FIRST}
    handle.remove()
    apply_(model, [Relu2FFN()])
    left = getattr(model.model.layers[1].mlp.up_proj, register)
    if "register it again" in str(refused.value):  # what a refusal says to do can be done
        left(HOOKS[register])
    else:
        with pytest.raises(PassError, match=f"^{register} on what is left of a Linear would never fire"):
            left(HOOKS[register])
        assert "register one on model.layers.1, " in str(refused.value)
        getattr(model.model.layers[1], register)(HOOKS[register])
        model(tokens()).sum().backward()


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


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_would_not_be_read_is_not_registered() -> None:
    """On what is left inside of a region, and under names that its graph has asked for."""
    model = nn.Sequential(SwiGLU(), SwiGLU())
    apply_(model, [Weight24(scope="mlp", from_step=9)])
    x, mlp = features(2, 16), model[0]
    before, names = model(x), [*model.state_dict()]
    linear = nn.Linear(16, 32)
    for register in (
        lambda: mlp.up.register_buffer("scale", torch.ones(1)),
        lambda: mlp.up.register_module("lora", linear),
        lambda: mlp.up.add_module("lora", linear),
        lambda: mlp.up.register_parameter("extra", linear.bias),
        lambda: setattr(mlp.up, "extra", linear.bias),
        lambda: prune.random_unstructured(mlp.up, "weight", amount=0.5),
    ):
        with pytest.raises(PassError, match=r"on what is left of a Linear would not be read.*before apply_"):
            register()
    with pytest.raises(
        PassError, match=r"a Linear in the place of up would not be called.*Put it there first"
    ):
        mlp.register_module("up", linear)
    with pytest.raises(PassError, match="a forward that is set on what is left of a Linear would never run"):
        mlp.up.forward = linear.forward
    assert torch.equal(model(x), before)
    assert [*model.state_dict()] == names
    mlp.up.register_parameter("weight", nn.Parameter(torch.ones_like(mlp.up.weight)))  # which is read
    assert not torch.equal(model(x), before)
    held = dict(model.named_parameters())
    with pytest.raises(PassError, match=r"weight on what is left .* cannot be taken away, as weight"):
        torch.nn.utils.weight_norm(mlp.down)
    with pytest.raises(PassError, match=r"weight_orig on what is left of a Linear would not be read"):
        torch.nn.utils.spectral_norm(mlp.down)
    again = dict(model.named_parameters())
    assert [*again] == [*held]  # nothing is half done
    assert all(again[name] is held[name] for name in held)
    before = model(x)
    weight_norm(mlp.down)  # which makes a property of the weight: the graph reads that
    with torch.no_grad():
        mlp.down.parametrizations.weight.original0 *= 2
    pickle.loads(pickle.dumps(mlp.up))
    assert not torch.equal(model(x), before)
    row = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    apply_(row, [LowRank(attn_rank=4, mlp_rank=4)])
    for put in (row.register_module, row.add_module, row.__setattr__):
        with pytest.raises(PassError, match="3 of a Sequential would not be called"):
            put("3", linear)
    with pytest.raises(PassError, match="register_forward_hook on what is left of a ReLU would never fire"):
        row[1].register_forward_hook(lambda *_: None)


def test_what_torch_jit_has_traced_and_a_wrapper_of_a_class_of_its_own_are_named() -> None:
    row = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.trace(row, features(2, 16))

    class Parallel(nn.DataParallel):
        """As people make them, to reach attributes of the module inside."""

    said = {
        nn.Sequential(script, nn.Linear(16, 16)): r"0 \[TopLevelTracedModule\] is a script.*it is from",
        script: r"the model \[TopLevelTracedModule\] is a script",
        Parallel(row): r"the model \[Parallel\] is wrapped",
    }
    for model, message in said.items():
        for probe in (None, features(2, 16)):
            with pytest.raises(PassError, match=message):
                plan(model, [Weight24()], probe=probe)


def test_a_sharded_model_is_told_to_take_passes_first() -> None:
    """As fully_shard does it, which needs processes: a class between the module's own and its name."""
    sharding = type("FSDPModule", (), {"__module__": "torch.distributed.fsdp"})
    model = Trunk(SwiGLU)
    model.blocks[0].mlp.__class__ = type("FSDPSwiGLU", (sharding, SwiGLU), {})
    with pytest.raises(PassError, match=r"blocks\.0\.mlp \[FSDPSwiGLU\] is sharded: apply the passes first"):
        apply_(model, [Relu2FFN()])


def test_data_parallel_is_refused_where_it_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `nn.DataParallel` makes replicas in every forward, with copies on a processor for those on GPUs."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    copies = lambda tensors, devices, **_: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda t, d, detach=False: copies(t, d))
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, _: device)
    stock = Trunk(SwiGLU)
    one, two = replicate.replicate(stock, [0, 1])
    x = features(2, 16)
    assert torch.equal(one(x), stock(x))
    assert torch.equal(two(x), stock(x))
    for passes in ([LowRank(attn_rank=4, mlp_rank=4)], [Weight24(scope="mlp")]):
        model = Trunk(SwiGLU)
        apply_(model, passes)
        with pytest.raises(PassError, match=r"nn\.DataParallel copies a Block .*DistributedDataParallel"):
            replicate.replicate(model, [0, 1])
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    apply_(model, [LowRank(attn_rank=4, mlp_rank=4)])
    with pytest.raises(PassError, match=r"nn\.DataParallel copies a Sequential"):
        replicate.replicate(model, [0, 1])
    assert nn.DataParallel(model, device_ids=[])(x).shape == x.shape  # which copies nothing
