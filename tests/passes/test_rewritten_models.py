"""What can be done to a model of transformers can be done to a rewritten one, with any pass in force."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from slow import slow_but
from torch import Tensor, nn
from toys import SwiGLU, Trunk, llama, tokens

from act24.errors import Act24Error
from act24.passes import (
    REGISTRY,
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    Lora,
    Lost,
    LowRank,
    MaskedLora,
    Pass,
    PassError,
    Pipeline,
    Recompute,
    Relu2FFN,
    Weight24,
    apply_,
)
from act24.passes.sparse_mask import SparseMask

transformers = pytest.importorskip("transformers")

RANKS = {"attn_rank": 8, "mlp_rank": 8}
PASSES: dict[str, Callable[[], list[Pass]]] = {
    "relu2_ffn": lambda: [Relu2FFN()],
    "activation24": lambda: [Relu2FFN(), Activation24()],
    "activation24 mvue": lambda: [Relu2FFN(), Activation24(method="mvue")],
    "low_rank": lambda: [LowRank(**RANKS)],
    "cola activation24": lambda: [Cola(**RANKS, bottleneck="relu2"), Activation24()],
    "lost": lambda: [Lost(**RANKS)],
    "weight24": lambda: [Weight24()],
    "recompute": lambda: [Relu2FFN(), Cola(**RANKS, bottleneck="relu2"), Activation24(), Recompute()],
    "fp8": lambda: [Fp8()],
    "sparse_mask": lambda: [SparseMask()],
    "lora": lambda: [Lora(targets=("*",), dropout=0.0)],
    "masked_lora": lambda: [MaskedLora()],
    "activation_statistics": lambda: [Relu2FFN(), ActivationStatistics()],
    "activation24 scales": lambda: [Relu2FFN(), Activation24(method="soft_threshold_weights")],
    "activation24 measures": lambda: [Relu2FFN(), Activation24(method="soft_dynamic", backward="split_gemm")],
    "weight24 scales": lambda: [Weight24(method="soft_threshold", precision="fp8")],
    "weight24 decays": lambda: [Weight24(method="sr_ste")],
    "recompute lost": lambda: [Lost(**RANKS, bottleneck="relu2"), Activation24(), Recompute()],
    "recompute low_rank": lambda: [Relu2FFN(), LowRank(**RANKS), Activation24(), Recompute()],
    "lora low_rank": lambda: [LowRank(scope="mlp", mlp_rank=8), Lora(dropout=0.0)],
}
#: In the fast tests are those that change a graph most.
FAST = ("cola activation24", "lost", "weight24", "recompute")


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(0))


def build(kind: str = "LlamaForCausalLM", **sizes: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    config = model.config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        **sizes,
    )
    return model(config).eval()


@pytest.fixture(params=slow_but(FAST, PASSES))
def rewritten(request: pytest.FixtureRequest) -> tuple[Any, Pipeline]:
    model = build()
    return model, apply_(model, PASSES[request.param]())


def test_every_pass_is_here() -> None:
    assert {p.name for make in PASSES.values() for p in make()} == {*REGISTRY}


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", slow_but((_pickled,), [copy.deepcopy, _pickled, _saved]))
def test_copies_compute_the_same(rewritten: Any, copied: Callable[[Any], Any]) -> None:
    model, pipeline = rewritten
    with pipeline.evaluation():
        other = copied(model)
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    assert all(a is not b for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_pipeline_is_copied_with_its_model(rewritten: Any) -> None:
    """As for an average of the weights, which has to follow every lowering and train on."""
    model, pipeline = rewritten
    twin, its = copy.deepcopy((model, pipeline))
    assert its.model is twin
    assert [its.regions[name] is twin.get_submodule(name) for name in pipeline.regions] == [True] * len(
        pipeline.regions
    )
    assert torch.equal(twin(ids()).logits, model(ids()).logits)
    classes = [type(module) for module in pipeline.modules]
    its.lower_(0, without=[p.name for p in its.passes if p.kind == "operational"])
    assert [type(module) for module in pipeline.modules] == classes
    its.lower_(0)
    assert [type(module) for module in its.modules] == classes
    gradients = []
    for one, of_one in ((model, pipeline), (twin, its)):
        one.train()
        of_one.begin_update_(0, ids())
        one(ids()).logits.square().mean().backward()
        gradients.append([p.grad for p in one.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        next(its.modules[0].parameters()).zero_()
    assert not torch.equal(twin.eval()(ids()).logits, model.eval()(ids()).logits)


@pytest.mark.parametrize("saving", [pickle.dumps, lambda both: torch.save(both, io.BytesIO()), copy.copy])
def test_a_pipeline_that_is_saved_says_what_can_be(saving: Callable[[Any], object]) -> None:
    model = Trunk(SwiGLU)
    pipeline = apply_(model, [Relu2FFN(), Activation24()])
    with pytest.raises(PassError, match=r"pipeline cannot be pickled or saved.* save model\.state_dict\(\)"):
        saving(pipeline if saving is copy.copy else (model, pipeline))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_copies_keep_what_a_later_pass_needs(copied: Callable[[Any], Any]) -> None:
    """Masks of a pass that is not in force yet are no part of the graph."""
    model = Trunk(SwiGLU).eval()
    apply_(model, [Weight24(scope="mlp", from_step=5)])
    other = copied(model)
    assert [*other.state_dict()] == [*model.state_dict()]
    assert [*dict(other.named_buffers())] == [*dict(model.named_buffers())]
    assert any("24_mask" in name for name in other.state_dict())


def test_a_pipeline_that_was_copied_before_it_was_committed() -> None:
    model = llama()
    planned = Pipeline(model, [Relu2FFN(), Weight24(scope="attn")])
    twin = copy.deepcopy(planned)
    twin.commit_()
    planned.commit_()
    assert twin.model is not model
    assert torch.equal(twin.model.eval()(tokens()), model.eval()(tokens()))
    model.train()
    with pytest.raises(Act24Error, match="begin_update_"):
        twin.model.train()(tokens())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing(rewritten: Any) -> None:
    model, pipeline = rewritten
    gradients = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        pipeline.begin_update_(0, ids())
        model(ids()).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.gradient_checkpointing_enable()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_generate_with_every_cache(rewritten: Any, window: int | None) -> None:
    """Those that transformers makes on a CPU without other packages, of whole attention and of a sliding
    window."""
    model, pipeline = rewritten
    if window is not None:
        model = build("MistralForCausalLM", sliding_window=window)
        apply_(model, pipeline.passes)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    without = model.generate(ids(1, 7), **options, use_cache=False)
    assert without.shape == (1, 12)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(ids(1, 7), **options, cache_implementation=cache), without)


@pytest.mark.slow
def test_generate_with_a_quantized_cache(rewritten: Any) -> None:
    """In e4m3, the one that needs no other package: what follows the first token is near the exact logits."""
    model, _ = rewritten
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    fp8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    exact = model.generate(ids(1, 7), **options, use_cache=False).logits[1]
    found = model.generate(ids(1, 7), **options, **fp8).logits[1]
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("rewritten", slow_but(("lost", "weight24"), PASSES), indirect=True)
def test_export(rewritten: Any) -> None:
    model, pipeline = rewritten
    expected = model(ids()).logits
    with pipeline.evaluation():
        exported = torch.export.export(copy.deepcopy(model), (ids(),), {"use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(ids(), use_cache=False).logits, expected)


def test_from_meta_by_to_empty(rewritten: Any) -> None:
    """Masks and scales are those of the weights that are loaded, as if the model had never been on meta."""
    model, pipeline = rewritten
    with torch.device("meta"):
        twin = build()
    other = apply_(twin, pipeline.passes)
    twin.to_empty(device="cpu")
    for module in other.modules:
        for name, (kind, _) in module.buffer_kinds.items():
            module.get_buffer(name).fill_(1) if "mask" in kind else None  # whatever lay there
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("24_mask")}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("24_mask") for name in missing)
    for name, buffer in model.named_buffers():
        if name.endswith(("inv_freq",)):
            twin.get_buffer(name).copy_(buffer)
    if not any(isinstance(p, Lost) for p in pipeline.passes):  # whose columns came with the state
        other.reset_buffers_()
    kept = dict(model.named_buffers())
    assert all(torch.equal(buffer, kept[name]) for name, buffer in twin.named_buffers() if "24_mask" in name)
    assert torch.equal(twin.eval()(ids()).logits, model(ids()).logits)


def test_what_is_assigned_on_meta_stays_when_the_model_is_moved() -> None:
    """Loading by `assign` leaves meta without `to_empty`; a later `.to` had put first values over it."""
    passes = [Lost(scope="mlp", mlp_rank=4, sparsity=0.25)]
    model = Trunk(SwiGLU)
    apply_(model, passes)
    with torch.device("meta"):
        twin = Trunk(SwiGLU)
        apply_(twin, passes)
    twin.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    twin.to(torch.float64).to(torch.float32)
    loaded = dict(twin.named_buffers())
    assert all(torch.equal(loaded[name], buffer) for name, buffer in model.named_buffers())


def test_what_to_empty_makes_has_the_first_values_of_buffers() -> None:
    """Until a state dict brings others: no scale and no column may be what lay in memory."""
    with torch.device("meta"):
        model = Trunk(SwiGLU)
        lost = Lost(scope="mlp", mlp_rank=4, sparsity=0.25, bottleneck="relu2")
        apply_(model, [lost, Activation24(method="soft_dynamic")])
    torch.use_deterministic_algorithms(True)  # which fills what is empty with the largest numbers
    try:
        model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isnan().all() for p in model.parameters())
    buffers = dict(model.named_buffers())
    columns = [value.tolist() for name, value in buffers.items() if name.endswith("down.column_indices")]
    assert columns == [[0, 4, 8, 12, 16, 20, 24, 28]] * 2
    scales = [float(value) for name, value in buffers.items() if name.endswith("24_scale")]
    assert scales == [1.0] * 6
    assert all(value.isfinite().all() for value in buffers.values())


def test_resizing_a_head_that_has_become_factors_is_refused_by_name() -> None:
    model = build()
    apply_(model, [LowRank(**RANKS, targets=("lm_head",))])
    with pytest.raises(PassError, match=r"resize_token_embeddings .* resize the stock model"):
        model.resize_token_embeddings(120)
    model = build()
    apply_(model, [LowRank(**RANKS)])
    model.resize_token_embeddings(120)
    assert model(ids()).logits.shape == (2, 9, 120)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ddp_and_fsdp_after(rewritten: Any, tmp_path: Any) -> None:
    """One process; their wrappers and what they replace."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, pipeline = rewritten
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        gradients = []
        for kind in ("plain", "ddp", "fsdp"):
            run, its = copy.deepcopy((model, pipeline))
            if kind == "ddp":
                run = nn.parallel.DistributedDataParallel(run)
            if kind == "fsdp":
                mesh = init_device_mesh("cpu", (1,))
                for block in run.model.layers:
                    fully_shard(block, mesh=mesh)
                run = fully_shard(run, mesh=mesh)
            run.train()
            its.begin_update_(0, ids(), forward=run, reduce=lambda tensor: tensor, rank=0)
            run(ids()).logits.square().mean().backward()
            parameters = [p for p in run.parameters() if p.requires_grad]
            gradients.append([getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in parameters])
        for other in gradients[1:]:
            for a, b in zip(gradients[0], other, strict=True):
                torch.testing.assert_close(a, b)
    finally:
        dist.destroy_process_group()
