"""Optimizers as recipes ask for them: which, over what, on one process and on several."""

import children
import pytest
import torch
import torch.distributed as dist

from act24.errors import Act24Error
from act24.initialise import build_llama
from act24.llama import LlamaConfig
from act24.optim import AdamW, AdamWOptions, LOROAdamW, LOROAdamWOptions
from act24.passes import LowRank, apply_
from act24.tools.run.batched_eigh import batched_eigh, describe_eigh
from act24.tools.run.optimizers import build_optimizer, learning_rate, shared_out
from act24.tools.run.processes import Processes, open_processes

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
LORO = LOROAdamWOptions(lr=0.01, exact_every=2)


def low_rank_model():
    model = build_llama(CONFIG, seed=0)
    return model, apply_(model, [LowRank(attn_rank=8, mlp_rank=12)])


def test_adamw_gets_its_groups():
    optimizer = build_optimizer(build_llama(CONFIG, 0), AdamWOptions(lr=0.1, weight_decay=0.2))
    assert type(optimizer) is AdamW
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {"decay": 0.2, "no_decay": 0.0}


def test_loro_gets_the_factors_that_the_pipeline_made():
    model, pipeline = low_rank_model()
    optimizer = build_optimizer(model, LORO, pipeline=pipeline)
    assert isinstance(optimizer, LOROAdamW)
    scales = {g["name"]: (g["lr_scale"], len(g["params"])) for g in optimizer.param_groups if g["factors"]}
    assert scales == {"factors_rank_8": (8 / 32, 16), "factors_rank_12": (12 / 32, 12)}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_the_learning_rate_is_that_of_the_schedule(tiny):
    recipe = tiny(
        "schedule.name=cosine_restart", "schedule.restart_every=5", "train.steps=20", "optimizer.lr=0.5"
    )
    assert learning_rate(recipe, 5) == 0.5e-6
    reset = tiny("optimizer.momentum_reset_steps=6", "optimizer.momentum_reset_warmup=2")
    plain = tiny()
    assert learning_rate(reset, 6) == pytest.approx(1e-6 * learning_rate(plain, 6))
    assert learning_rate(reset, 8) == learning_rate(plain, 8)


def train(model, optimizer, steps, rows=slice(None)):
    for step in range(steps):
        ids = torch.randint(97, (4, 9), generator=torch.Generator().manual_seed(step))[rows]
        loss = torch.nn.functional.cross_entropy(
            model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten()
        )
        loss.backward()
        yield
        optimizer.step()
        optimizer.zero_grad()


def alone(steps):
    model, pipeline = low_rank_model()
    for _ in train(model, build_optimizer(model, LORO, pipeline=pipeline), steps):
        pass
    return model


def flipping(rank):
    """An eigendecomposition that differs between processes, as rounding or signs may."""

    def eigh(matrices):
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors * (-1) ** rank

    return eigh


def replicated(expected):
    """Averages gradients by hand, so that nothing but the optimizer could keep the ranks equal."""
    with open_processes() as processes:
        model, pipeline = low_rank_model()
        optimizer = build_optimizer(model, LORO, pipeline=pipeline, processes=processes)
        optimizer._eigh = flipping(processes.rank)
        for _ in train(model, optimizer, 4, slice(2 * processes.rank, 2 * processes.rank + 2)):
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        for name, value in model.state_dict().items():
            both = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(both, value)
            assert torch.equal(*both), name
            if not name.endswith(("weight_in", "weight_out")):
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def sharded(expected):
    from torch.distributed.fsdp import fully_shard

    with open_processes() as processes:
        model, pipeline = low_rank_model()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = build_optimizer(model, LORO, pipeline=pipeline, processes=processes)
        for _ in train(model, optimizer, 4, slice(2 * processes.rank, 2 * processes.rank + 2)):
            pass
        assert optimizer.diagnostics_()["guarded"] == 0
        for name, value in model.state_dict().items():
            value = value.full_tensor()
            if not name.endswith(("weight_in", "weight_out")):
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parallel", [replicated, sharded])
def test_two_processes_make_the_updates_of_one(parallel):
    children.run_ranks(2, parallel, alone(4).state_dict())


def share_parts(count):
    with open_processes() as processes:
        stack = torch.arange(count * 3).reshape(count, 3)
        asked = []

        def compute(part):
            asked.append(part.stop - part.start)
            return stack[part] * 2, stack[part, 0] % 2 == 0

        doubled, even = shared_out(processes, compute, count)
        assert asked == [-(-count // processes.world_size)]
        assert torch.equal(doubled, stack * 2)
        assert torch.equal(even, stack[:, 0] % 2 == 0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_sharing_out_gives_every_process_the_whole_stack(count):
    children.run_ranks(3, share_parts, count)


def test_a_missing_hidden_size_is_named():
    model, pipeline = low_rank_model()
    del model.config
    with pytest.raises(Act24Error, match="hidden_size"):
        build_optimizer(model, LORO, pipeline=pipeline)


def test_batched_eigh_is_eigh():
    matrices = torch.randn(3, 40, 40, dtype=torch.float64)
    matrices = matrices + matrices.mT
    for mine, theirs in zip(batched_eigh(matrices), torch.linalg.eigh(matrices), strict=True):
        assert torch.equal(mine, theirs)
    assert describe_eigh(torch.device("cpu")) == "torch.linalg.eigh"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [33, 96, 512])
def test_cusolver_decomposes_a_stack(dtype, size):
    assert describe_eigh(torch.device("cuda")) == "cuSOLVER XsyevBatched"
    matrices = torch.randn(5, size, size, dtype=dtype, device="cuda")
    matrices = matrices @ matrices.mT
    before = matrices.clone()
    values, vectors = batched_eigh(matrices)
    assert torch.equal(matrices, before)
    scale = values.amax().item()
    tolerance = {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps * scale}
    torch.testing.assert_close(matrices @ vectors, vectors * values[:, None], **tolerance)
    # In float64: PyTorch's own in float32 is off by ten times that tolerance at 512.
    expected = torch.linalg.eigvalsh(matrices.double()).to(dtype)
    torch.testing.assert_close(values, expected, **tolerance)
    identity = torch.eye(size, dtype=dtype, device="cuda").expand_as(matrices)
    torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_one_process_shares_nothing():
    model, pipeline = low_rank_model()
    single = Processes(0, 1, torch.device("cpu"))
    optimizer = build_optimizer(model, LORO, pipeline=pipeline, processes=single)
    for _ in train(model, optimizer, 2):
        pass
    for name, value in alone(2).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
