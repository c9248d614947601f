"""Kernels sorted by their names, and the bytes and products of a step's limit; a GPU measures the rest."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import act24
from act24.errors import Act24Error
from act24.llama import LlamaForCausalLM, llama_config
from act24.loss import CHUNK_TOKENS
from act24.tools.bench import kernel_groups as groups
from act24.tools.bench import limit
from act24.tools.bench.kernel_groups import Kernel, busy, by_group, group_of, kernels_of, own_kernels
from act24.tools.bench.step_bytes import FORMS, Shape, attention_operations, bytes_of, norm_bytes
from act24.tools.commands.show import show_limit
from act24.tools.run.build import build
from act24.tools.run.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))

NAMES = {
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT": groups.PRODUCTS,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": groups.PRODUCTS,
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(Params)": groups.PRODUCTS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": groups.PRODUCTS,
    "triton_tem_fused_mm_3": groups.PRODUCTS,
    "sm90_xmma_sparse_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x128_cslt": groups.SPARSE,
    "_pack_activation": groups.OWN,
    "_unpack_gradient": groups.OWN,
    "_cast_e4m3": groups.OWN,
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>": groups.ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": groups.ATTENTION,
    "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(Params)": groups.ATTENTION,
    "triton_red_fused__fused_rms_norm__to_copy_add_2": groups.ELEMENTWISE,
    "triton_poi_fused_mul_silu_silu_backward_0": groups.ELEMENTWISE,
    "triton_poi_fused__to_copy_add_mul_sub_transpose_unsqueeze_1": groups.ELEMENTWISE,
    "triton_red_fused__log_softmax__to_copy_1": groups.LOSS,
    "triton_poi_fused_exp_scatter_2": groups.LOSS,
    "triton_per_fused_prepare_softmax_online_0": groups.LOSS,
    "triton_poi_fused__to_copy_0": groups.CASTS,
    "triton_poi_fused__to_copy_t_transpose_view_11": groups.CASTS,
    "triton_poi_fused_clone_view_3": groups.CASTS,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": groups.CASTS,
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda()>": groups.CASTS,
    "Memcpy HtoD (Pinned -> Device)": groups.CASTS,
    "Memset (Device)": groups.CASTS,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>": groups.OPTIMIZER,
    "_update": groups.OPTIMIZER,
    "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float, true, float>": groups.OPTIMIZER,
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)": groups.ATTENTION,
    "void at::native::radixSortKVInPlace<-2, -1, 128, 32, int, long, unsigned int>": groups.OWN,
    "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<>": groups.EMBEDDING,
    "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<>": groups.EMBEDDING,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": groups.ELEMENTWISE,
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<>": groups.ELEMENTWISE,
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<>": groups.ELEMENTWISE,
    "some_new_kernel": groups.UNKNOWN,
    "_update_everything": groups.UNKNOWN,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_group_of_a_kernel(name):
    assert group_of(name) == NAMES[name]


def test_own_kernels_are_all_that_are_launched():
    """By where they are launched, `_name[grid](`."""
    package = Path(act24.__file__).parent
    files = [path for folder in ("sparse24", "fp8", "inference") for path in (package / folder).rglob("*.py")]
    launched = r"^ +(_\w+)\[[^\n]*\]\($"
    found = {
        name
        for path in files
        for name in re.findall(launched, path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert "_pack_activation" in found
    assert found <= own_kernels()
    assert "_update" not in own_kernels()


def test_launches_are_read_from_a_trace_and_shared_out(tmp_path):
    events = [
        {"ph": "X", "cat": "kernel", "name": "_pack_activation", "ts": 30.0, "dur": 4.0},
        {"ph": "X", "cat": "kernel", "name": "nvjet_tst_1", "ts": 10.0, "dur": 6.0},
        {"ph": "X", "cat": "kernel", "name": "nvjet_tst_2", "ts": 12.0, "dur": 2.0},
        {"ph": "X", "cat": "kernel", "name": "odd", "ts": 50.0, "dur": 2.0},
        {"ph": "X", "cat": "kernel", "name": "nvjet_tst_1", "ts": 20.0, "dur": 6.0},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": 15.0, "dur": 3.0},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW.step", "ts": 0, "dur": 99},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 99},
        {"ph": "M", "name": "process_name"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    kernels = kernels_of(tmp_path / "trace.json")
    assert [kernel.began for kernel in kernels] == [10.0, 12.0, 15.0, 20.0, 30.0, 50.0]
    shared = by_group(kernels, 2)
    assert [(s.name, s.count, s.milliseconds) for s in shared[groups.PRODUCTS]] == [
        ("nvjet_tst_1", 1, 0.006),
        ("nvjet_tst_2", 0.5, 0.001),
    ]
    assert sum(s.milliseconds for shares in shared.values() for s in shares) == pytest.approx(23e-3 / 2)
    assert limit.groups_of(shared, {groups.PRODUCTS: 0.1})[0]["limit_ms"] == 0.007
    found = limit.groups_of(shared, {groups.PRODUCTS: 0.005, groups.LOSS: 1.0, groups.SPARSE: 0.0})
    assert [(g["group"], g["limit_ms"]) for g in found] == [
        (groups.PRODUCTS, 0.005),
        (groups.OWN, None),
        (groups.LOSS, 1.0),
        (groups.CASTS, None),
        (groups.UNKNOWN, None),
    ]
    assert found[-1]["kernels"] == [{"name": "odd", "count": 0.5, "ms": 0.001}]


def test_busy_time_counts_what_runs_at_once_only_once():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        began = torch.randint(0, 60, (12,), generator=generator).sort().values.tolist()
        took = torch.randint(0, 15, (12,), generator=generator).tolist()
        covered = {µs for b, t in zip(began, took, strict=True) for µs in range(b, b + t)}
        assert busy([Kernel("k", b, t) for b, t in zip(began, took, strict=True)]) == len(covered)


def elements(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


SHAPE = Shape(
    tokens=6 * 128,
    length=128,
    config=llama_config("llama-9m", num_key_value_heads=2, vocab_size=500),
    features=352,
    form="swiglu",
    residual=4,
    parameter=4,
    moment=4,
    casts=True,
    micro_batches=3,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual", [2, 4])
def test_the_bytes_of_stages_are_those_of_their_tensors(form, residual):
    """Every tensor between products of two blocks, written down as PyTorch would hold it."""
    shape = replace(SHAPE, form=form, residual=residual, config=replace(SHAPE.config, num_hidden_layers=2))
    config, tokens = shape.config, shape.tokens
    with torch.device("meta"):
        stream = torch.empty(
            tokens, config.hidden_size, dtype={2: torch.bfloat16, 4: torch.float32}[residual]
        )
        branch = torch.empty(tokens, config.hidden_size, dtype=torch.bfloat16)
        hidden = torch.empty(tokens, shape.features, dtype=torch.bfloat16)
        fields = torch.empty(tokens, shape.features // 16, dtype=torch.int16)  # two bits for each that stays
        query = torch.empty(tokens, 128, dtype=torch.bfloat16)
        key = torch.empty(tokens, 64, dtype=torch.bfloat16)  # two of four heads
    values = elements(hidden) // 2
    metadata = elements(fields)
    network = {
        "swiglu": elements(*[hidden] * 3) + elements(*[hidden] * 5),
        "relu2": elements(*[hidden] * 2) + elements(*[hidden] * 3),
        "masked": elements(*[hidden] * 2) + elements(*[hidden] * 3),
        # hidden -> packed; gradient and packed -> packed gradient, and both dense for the weights' gradients.
        "packed dense": elements(hidden) + values + metadata + 3 * elements(hidden) + 2 * (values + metadata),
        # gradient and packed -> gradient along features, it and the activation along tokens.
        "packed sparse": elements(hidden) + values + metadata + elements(hidden) + 4 * (values + metadata),
    }
    branches = 4 if form != "swiglu" else 5
    norms = 2 * elements(stream, branch, stream, branch)  # x + branch, and its norm
    norms += branches * elements(branch) + 2 * elements(stream, stream, stream, branch)
    assert norms == norm_bytes(shape) * tokens * config.hidden_size
    found = bytes_of(shape)
    rotary = 4 * elements(query, key)
    between = found[groups.ELEMENTWISE] + found[groups.OWN]
    if form in network:
        assert between == 2 * (rotary + norms + network[form])
    assert (found[groups.OWN] > 0) == form.startswith(("packed", "masked"))
    # q, k, v, o forward; those, the gradient of o, and three gradients backward.
    assert found[groups.ATTENTION] == 2 * elements(*[query] * 6, *[key] * 6)
    assert found[groups.LOSS] == 3 * tokens * 500 * 2


def test_the_bytes_of_weights_and_updates():
    """Of a model that is built: casts of what linears multiply by, and all that AdamW reads and writes."""
    model = LlamaForCausalLM(SHAPE.config)
    shape = replace(SHAPE, config=model.config, features=model.config.intermediate_size, tokens=64)
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    parameters = sum(p.numel() for p in model.parameters())
    assert shape.linears == sum(weights)
    found = bytes_of(shape)
    head = model.lm_head.weight.numel()
    assert found[groups.CASTS] == sum(weights) * (4 + 2 + 2 + 4 + 4) + head * (2 + 4 + 4)
    # Read for the norm; parameter, moments and gradient read, three written; zeroed.
    assert found[groups.OPTIMIZER] == parameters * 4 * (1 + 4 + 3 + 1) / 3
    pure = replace(shape, residual=2, parameter=2, casts=False, micro_batches=1)
    assert bytes_of(pure)[groups.OPTIMIZER] == parameters * (2 + 22 + 2)
    assert bytes_of(replace(shape, tokens=3 * CHUNK_TOKENS))[groups.CASTS] > found[groups.CASTS]


def test_the_operations_of_attention_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    query = torch.randn(6, 4, 128, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        scores = query @ query.transpose(-1, -2)
        out = F.softmax(scores, -1) @ query
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    # Backward computes the scores once more; a causal row has half of them.
    counted = forward.get_total_flops() + backward.get_total_flops() + forward.get_total_flops() / 2
    assert attention_operations(replace(SHAPE, config=llama_config("llama-9m"))) == 4 * counted / 2


def test_a_whole_side_on_a_machine_that_is_played(tiny, monkeypatch, capsys):
    """Events that are a second apart, and a trace of one product and a kernel that nobody knows."""
    recipe = tiny("passes=[]", "train.total_batch_size=8")

    def profiled(step, file):
        step()
        names = {"nvjet_tst": 8e5, "who_is_this": 1e5}
        events = [
            {"cat": "kernel", "name": name, "ts": 1e6 * i, "dur": took}
            for i, (name, took) in enumerate(names.items())
        ]
        file.write_text(json.dumps({"traceEvents": events}))
        return file

    marks = iter(range(100))
    event = lambda **_: SimpleNamespace(  # noqa: E731
        at=next(marks), record=lambda: None, elapsed_time=lambda _: 1000.0
    )
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(limit, "needed_gpu", lambda: ALONE.device)
    monkeypatch.setattr(limit, "copy_rate", lambda _: 4e12)
    monkeypatch.setattr(limit, "product_rate", lambda _: 8e14)
    monkeypatch.setattr(limit, "burst_milliseconds", lambda call: (call(), 0.5)[1])
    monkeypatch.setattr(limit, "without_start", lambda recipe, device, step: build(recipe, device, step))
    monkeypatch.setattr(limit, "_profiled", profiled)
    monkeypatch.setattr(limit, "_WARMUP", 1)
    monkeypatch.setattr(limit, "_TIMED", 1)

    def recipe_of(size, kind, count=None):
        if kind == "relu2":
            raise RuntimeError("no such kind here\nand more")
        train = recipe.train.model_copy(update={"total_batch_size": 4 * (count or 2)})
        return recipe.model_copy(update={"train": train})

    monkeypatch.setattr(limit, "recipe_of", recipe_of)
    monkeypatch.setitem(limit.SIZES, "130m", limit.Size("130m", 4, 2))
    said = []
    result = limit.bench_limit(["130m"], ["relu2", "dense"], said.append)
    assert said[0] == "130m relu2 is left out: RuntimeError: no such kind here"
    assert said[2].startswith("130m dense: ")
    (side,) = result["sides"]
    assert (side["ms"], side["kernels_ms"], side["gaps_ms"]) == (500.0, 450.0, 50.0)
    by_name = {group["group"]: group for group in side["groups"]}
    # Forward, the input's gradient and the weight's, of seven linears of two blocks and of the head.
    assert sum(each["count"] for each in side["products"]) == 3 * (7 * 2 + 1)
    assert not any(each["sparse"] for each in side["products"])
    counts = [each["count"] for each in side["products"]]
    assert counts == sorted(counts, reverse=True)  # all take half a ms
    of_head = [each for each in side["products"] if each["operands"] == ["float32 64×32", "float32 32×300"]]
    assert [each["count"] for each in of_head] == [1]  # 4 rows of 16
    assert by_name["dense products"]["limit_ms"] == 0.5 * 3 * (7 * 2 + 1) < by_name["dense products"]["ms"]
    assert by_name["unknown"]["limit_ms"] is None
    assert "no CUDA GPU" in side["not_captured"]
    show_limit(result, as_json=False)
    out = capsys.readouterr().out
    assert "unknown kernel: who_is_this, 0.5 of 50.0 ms in all" in out
    show_limit(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))


def test_what_is_not_there_is_refused(monkeypatch):
    with pytest.raises(Act24Error, match="sizes"):
        limit.bench_limit(["2b"])
    with pytest.raises(Act24Error, match="kinds"):
        limit.bench_limit(["7b"], ["lost"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Act24Error, match="times a GPU"):
        limit.bench_limit(["7b"])


@pytest.mark.parametrize("kind", limit.KINDS)
@pytest.mark.parametrize("size", limit.SIZES)
def test_the_recipe_of_a_side_loads(size, kind):
    recipe = limit.recipe_of(size, kind)
    packed = "activation24 at 12: packed 2:4 products" if kind == "relu2-act24" else ""
    shape = limit.shape_of(recipe, packed)
    backward = "dense" if size == "130m" else "split_gemm"
    assert shape.form == {"relu2-act24": f"packed {backward}", "dense": "swiglu", "relu2": "relu2"}[kind]
    assert shape.tokens == 16384
    assert (shape.casts, shape.moment) == (size != "7b", 4)
    assert recipe.log.activation_statistics
