"""The pass `fp8`: which linears it takes, what it leaves, and what a training loop owes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import llama, tokens

from act24.errors import Act24Error, PassError
from act24.fp8.linear import linear_fp8, underflow_counts
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.loss import cross_entropy_sum
from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    LowRank,
    Pass,
    Pipeline,
    Recompute,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
)
from act24.passes.fp8 import PARTS, head_arguments, pays
from act24.passes.graph.normal_form import nodes_of
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.weight.linear24 import linear24
from act24.tools.run.step import SummedLoss
from act24.tools.watch.fp8_watch import take_underflow_

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def taken(*passes: Pass, **sizes: int) -> list[str]:
    """The names of what fp8 takes in the first block."""
    report = plan(llama(**sizes), passes)
    return [r.fqn for r in report.rows if r.pass_name == "fp8" and ".0." in r.fqn]


def losses(model: LlamaForCausalLM, pipeline: Pipeline, updates: int = 3) -> list[Tensor]:
    optimizer, result = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step in range(updates):
        pipeline.begin_update_(step)
        for index in range(2):
            ids = tokens(seed=2 * step + index)
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            result.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return result


def test_it_takes_every_linear_of_the_blocks() -> None:
    names = [name.rpartition(".")[2] for name in taken(Fp8())]
    assert sorted(names) == sorted(LINEARS)


def test_it_takes_what_others_leave() -> None:
    assert [n.rpartition(".")[2] for n in taken(Relu2FFN(), Activation24(), Fp8())] == list(LINEARS[:4])
    assert not taken(Weight24(method="ste"), Fp8(optional=True))
    factors = taken(LowRank(attn_rank=16, mlp_rank=16), Fp8())
    assert len(factors) == 2 * len(LINEARS)
    with pytest.raises(PassError, match="activation24 stands behind fp8"):
        taken(Relu2FFN(), Fp8(), Activation24())


def test_targets_ignore_and_sizes_are_said() -> None:
    names = taken(Fp8(targets=("*mlp*",), ignore=("*down_proj",)))
    assert [n.rpartition(".")[2] for n in names] == ["gate_proj", "up_proj"]
    report = plan(llama(), [Fp8(precision="auto", optional=True)])
    assert not [r for r in report.rows if r.pass_name == "fp8"]
    assert "casts would take what products gain" in str(report)
    odd = plan(llama(intermediate_size=40), [Fp8()])
    assert "its weight is 40 × 32, and e4m3 wants multiples of 16" in str(odd)


def test_auto_takes_large_linears_only() -> None:
    assert all(pays(*shape) for shape in ((4096, 4096), (2048, 2048), (16384, 4096)))
    assert not any(pays(*shape) for shape in ((768, 768), (4096, 256)))


def test_it_trains_close_to_the_model_without_it_and_is_gone_in_evaluation() -> None:
    narrow, plain = llama(), llama()
    pipeline = apply_(narrow, [Fp8()])
    ids = tokens()
    with pipeline.evaluation():
        assert torch.equal(narrow(ids), plain(ids))
    assert torch.equal(narrow.eval()(ids), plain(ids))
    narrow.train()
    pipeline.begin_update_(0)
    difference = (narrow(ids) - plain(ids)).norm() / plain(ids).norm()
    assert 1e-3 < difference < 0.1
    ours, theirs = losses(narrow, pipeline), losses(plain, apply_(plain, []))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)
    assert ours != theirs


def test_casts_that_are_kept_are_those_of_every_update_at_one_address() -> None:
    kept, casting = llama().bfloat16(), llama().bfloat16()
    pipelines = []
    for model, keep in ((kept, True), (casting, False)):
        pipeline = apply_(model, [Fp8()])
        (p,) = pipeline.active
        assert isinstance(p, Fp8)
        pipeline.exchange_(p, replace(p, keep_cast=keep))
        pipelines.append(pipeline)
    pipelines[0].begin_update_(0)
    places = {n: b.data_ptr() for n, b in kept.named_buffers() if n.endswith(PARTS)}
    assert len(places) == 2 * len(LINEARS) * len(PARTS)
    assert losses(kept, pipelines[0]) == losses(casting, pipelines[1])
    assert {n: b.data_ptr() for n, b in kept.named_buffers() if n.endswith(PARTS)} == places
    assert not [n for n in kept.state_dict() if n.endswith(PARTS)]


def test_step_ranges_and_recomputation() -> None:
    model = llama()
    pipeline = apply_(model, [Fp8(from_step=1, until_step=2)])
    found = []
    for step in range(3):
        pipeline.lower_(step)
        found.append(sum(len(list(nodes_of(m.graph, linear_fp8))) for m in pipeline.modules))
    assert found == [0, 2 * len(LINEARS), 0]
    results = []
    for extra in ((), (Recompute(),)):
        model = llama()
        pipeline = apply_(model, [Cola(attn_rank=16, mlp_rank=16), Fp8(), *extra])
        results.append(losses(model, pipeline, 1))
    torch.testing.assert_close(*results)


def test_activation24_goes_along_unless_it_says_otherwise() -> None:
    def options(*passes: Pass) -> str:
        model = llama(1)
        apply_(model, [Relu2FFN(), *passes])
        nodes = [n for m in model.modules() if hasattr(m, "graph") for n in nodes_of(m.graph, activation24)]
        return nodes[0].args[-1].precision

    assert options(Activation24()) == "bfloat16"
    assert options(Activation24(), Fp8()) == "fp8"
    assert options(Activation24(precision="bfloat16"), Fp8()) == "bfloat16"
    assert options(Activation24(precision="auto")) == "bfloat16"  # 32 wide
    assert options(Activation24(), Fp8(precision="auto", optional=True)) == "bfloat16"
    with torch.device("meta"):
        large = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=97,
                hidden_size=2048,
                intermediate_size=5504,
                num_attention_heads=16,
                num_hidden_layers=1,
            )
        )
    report = str(plan(large, [Relu2FFN(), Activation24(), Fp8(precision="auto")]))
    assert "2:4 naive, dense backward, fp8" in report


WEIGHT24 = {
    "dense gradient": (
        Weight24(method="ste"),
        "2:4 weight, ste; 2:4 in y",
        "2:4 weight, ste; e4m3 in y, dX, dW",
    ),
    "drawn": (
        Weight24(),
        "2:4 weight, transposable; 2:4 in y, dX, dW",
        "2:4 weight, transposable; e4m3 in y, dX; 2:4 in dW",
    ),
}


@pytest.mark.parametrize("kind", WEIGHT24)
def test_weight24_goes_along_unless_it_says_otherwise(kind: str) -> None:
    pass_, plain, narrow = WEIGHT24[kind]
    rest = Fp8(optional=True)
    for passes, told in (
        ((pass_,), plain),
        ((pass_, rest), narrow),
        ((replace(pass_, precision="bfloat16"), rest), plain),
        ((replace(pass_, precision="fp8"),), narrow),
        ((replace(pass_, precision="auto"),), plain),  # 32 wide
        ((pass_, Fp8(precision="auto", optional=True)), plain),
    ):
        model = llama(1)
        pipeline = apply_(model, passes)
        assert {row.after for row in pipeline.report.rows if row.pass_name == "weight24"} == {told}
        nodes = [n for m in pipeline.modules for n in nodes_of(m.graph, linear24)]
        report = pipeline.report
        halved = 0 if told == narrow else sum(row.parameters_before for row in report.rows)
        assert report.flops_before - report.flops_after == halved
        wanted = "fp8" if told == narrow else "bfloat16"
        assert {n.args[-1].precision for n in nodes} == {wanted}
        assert all(torch.isfinite(loss) for loss in losses(model, pipeline, 2))
        with pipeline.evaluation():  # is of the weights in their own dtype
            nodes = [n for m in pipeline.modules for n in nodes_of(m.graph, linear24)]
            assert {n.args[-1].precision for n in nodes} == {"bfloat16"}


def test_what_weight24_makes_zero_in_e4m3_is_counted() -> None:
    for precision in ("fp8", "bfloat16"):
        model = llama()
        passes = [Weight24(method="ste", precision=precision), ActivationStatistics(optional=True)]
        pipeline = apply_(model, passes)
        losses(model, pipeline, 1)
        shares = take_underflow_(pipeline)
        assert len(shares) == (2 * len(LINEARS) + 2 if precision == "fp8" else 0)
        assert all(0 <= share < 0.05 for share in shares.values())


def test_weight24_in_fp8_learns_as_in_bfloat16_and_says_what_it_leaves() -> None:
    results = []
    for precision in ("bfloat16", "fp8"):
        model = llama(1)
        pipeline = apply_(model, [Weight24(method="ste", precision=precision)])
        results.append(torch.stack(losses(model, pipeline, 6)))
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=3e-2, atol=0)
    odd = LlamaForCausalLM(
        LlamaConfig(97, 32, 72, 1, 2)  # 72 is no multiple of 16
    )
    rows = plan(odd, [Weight24(method="ste", precision="fp8")]).rows
    notes = {row.fqn.rpartition(".")[2]: (row.after, row.note) for row in rows}
    assert notes["q_proj"][0].endswith("e4m3 in y, dX, dW")
    assert notes["up_proj"][0].endswith("2:4 in y")
    assert "in bfloat16: e4m3 wants sides that are multiples of 16" in notes["up_proj"][1]


def test_what_becomes_zero_is_counted() -> None:
    """By hand: of 32 entries of a token 3 are below half of the smallest number beside a 1, and one is
    zero."""
    x = torch.ones(2, 16, 32)
    x[..., 1:4], x[..., 4], x[..., 5] = 2.0**-19, 0, 2.0**-9 * 0.9
    assert underflow_counts(x, "rowwise").tolist() == [2 * 31, 2 * 3]
    model = llama()
    pipeline = apply_(model, [Fp8(), ActivationStatistics(optional=True)])
    losses(model, pipeline, 1)
    shares = take_underflow_(pipeline)
    assert len(shares) == 2 * len(LINEARS) + 2
    assert all(0 <= share < 0.05 for share in shares.values())
    assert not take_underflow_(pipeline)
    with pipeline.evaluation():
        model(tokens())
    assert not take_underflow_(pipeline)


# The head


def head_row(model: nn.Module, *passes: Pass) -> list[str]:
    return [row.after for row in plan(model, passes).rows if row.fqn == "lm_head"]


def summed(model: LlamaForCausalLM) -> Tensor:
    """The loss as the training loop takes it, which multiplies with the head's weight itself."""
    ids = tokens() % 64
    return SummedLoss(model)(ids, ids.roll(-1, 1))[0]


def e4m3_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_fp8(hidden, weight, None)


def test_the_head_is_taken_by_option_or_name_and_by_nothing_else() -> None:
    e4m3 = ["e4m3 in y, dX, dW, rowwise"]
    for p, expected in (
        (Fp8(), []),
        (Fp8(head=True), e4m3),
        (Fp8(targets=("*", "lm_head")), e4m3),
        (Fp8(head=True, targets=("*mlp*",)), e4m3),
        (Fp8(head=True, scaling="tensorwise"), ["e4m3 in y, dX, dW, tensorwise"]),
    ):
        assert head_row(llama(vocab_size=64), p) == expected
    report = plan(llama(vocab_size=64), [Fp8(head=True, targets=("*mlp*",))])
    assert not any("attn" in row.fqn for row in report.rows)
    assert "fp8 reaches" in str(report)
    assert "feed-forward and head matrices" in str(report)


def test_a_head_that_cannot_be_in_e4m3_is_said_or_refused() -> None:
    assert "lm_head as it is: its weight is 97 × 32, and e4m3 wants multiples" in str(
        plan(llama(), [Fp8(head=True)])
    )
    small = str(plan(llama(vocab_size=64), [Fp8(head=True, precision="auto", optional=True)]))
    assert "lm_head as it is: its weight is 64 × 32, and casts would take" in small
    ignored = str(plan(llama(vocab_size=64), [Fp8(head=True, ignore=("lm_head",))]))
    assert "fp8 leaves lm_head as it is: ignore names it" in ignored
    tied = llama(vocab_size=64, tie_word_embeddings=True)
    with pytest.raises(PassError, match=r"fp8: head = true, and .* the embedding is the head"):
        plan(tied, [Fp8(head=True)])
    assert "fp8 leaves the model as it is: head = true" in str(plan(tied, [Fp8(head=True, optional=True)]))
    with pytest.raises(PassError, match="another pass has it"):
        plan(llama(vocab_size=64), [Weight24(targets=("lm_head",)), Fp8(head=True)])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_the_loop_s_loss_and_the_model_s_own_head_are_the_same_products(keep: bool, named: bool) -> None:
    """Of one step: logits, the loss over them, and both gradients, beside `linear_fp8` by hand."""
    model = llama(vocab_size=64).bfloat16()
    p = Fp8(targets=("lm_head",)) if named else Fp8(targets=("lm_head",), head=True)
    pipeline = apply_(model, [p])
    pipeline.exchange_(pipeline.active[0], replace(p, keep_cast=keep))
    pipeline.begin_update_(0)
    weight, ids = model.lm_head.weight, tokens() % 64
    hidden = model.model(ids).detach().requires_grad_()
    logits = e4m3_logits(hidden, weight)
    assert torch.equal(model(ids), logits)
    expected = F.cross_entropy(logits.float().flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = cross_entropy_sum(hidden, weight, ids.roll(-1, 1), 8192, *head_arguments(model.lm_head, hidden))[0]
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()
    assert torch.equal(summed(model).detach(), loss.detach())
    in_bfloat16 = cross_entropy_sum(hidden, weight, ids.roll(-1, 1))[0]
    assert not torch.equal(loss, in_bfloat16)
    parts = [getattr(model.lm_head, f"weight{part}") for part in PARTS]
    assert all(bool(part.numel()) is keep for part in parts)
    # Nobody else sees it.
    with pipeline.evaluation():
        assert torch.equal(summed(model), in_bfloat16)
    model.eval()
    assert torch.equal(summed(model), in_bfloat16)
    assert torch.equal(model(ids), F.linear(hidden, weight))
    assert sorted(model.state_dict()) == sorted(llama(vocab_size=64).state_dict())


def test_the_head_comes_and_goes_with_its_steps_and_follows_its_weight() -> None:
    model, plain = llama(vocab_size=64).bfloat16(), llama(vocab_size=64).bfloat16()
    p = Fp8(targets=("lm_head",), from_step=1, until_step=3)
    pipeline = apply_(model, [p])
    pipeline.exchange_(pipeline.passes[0], replace(p, keep_cast=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(4):
        pipeline.begin_update_(step)
        plain.load_state_dict(model.state_dict())
        loss, exact = summed(model), summed(plain)
        assert torch.equal(loss, exact) is (step not in (1, 2))
        hidden = plain.model(tokens() % 64)
        if step in (1, 2):
            by_hand = e4m3_logits(hidden, plain.lm_head.weight).float().flatten(0, 1)
            labels = (tokens() % 64).roll(-1, 1).flatten()
            torch.testing.assert_close(loss, F.cross_entropy(by_hand, labels, reduction="sum"))
        (loss / 18).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_head_that_another_pass_made_is_refused_by_the_loss() -> None:
    model = llama(vocab_size=64)
    pipeline = apply_(model, [Weight24(targets=("lm_head",))])
    pipeline.begin_update_(0)
    with pytest.raises(Act24Error, match="a pass has made something else of the head"):
        summed(model)


def test_forwards_through_the_head_and_past_it_are_one_micro_batch_each() -> None:
    """Seeds move once a forward, whichever module begins it, and evaluation holds to its end."""
    passes = [Relu2FFN(), Activation24(method="mvue"), Fp8(head=True, targets=("lm_head",))]
    whole, past, found = llama(vocab_size=64), llama(vocab_size=64), []
    for other, run in ((whole, lambda m: m(tokens() % 64)), (past, lambda m: m.model(tokens() % 64))):
        pipeline = apply_(other, passes)
        pipeline.begin_update_(0)
        places = [b for n, b in other.named_buffers() if n.endswith("24_seed")]
        values = []
        for _ in range(3):
            run(other)
            values.append(torch.stack(places).clone())
        assert len({tuple(v.flatten().tolist()) for v in values}) == 3
        found.append(torch.stack(values))
    assert torch.equal(*found)
    model = llama(vocab_size=64)
    apply_(model, passes)
    with pytest.raises(Act24Error, match="nobody began"):
        model.model(tokens() % 64)


def test_what_becomes_zero_of_the_head_s_input_is_counted_in_the_loop() -> None:
    model = llama(vocab_size=64)
    pipeline = apply_(model, [Fp8(head=True), ActivationStatistics(optional=True)])
    pipeline.begin_update_(0)
    summed(model).backward()
    shares = take_underflow_(pipeline)
    assert "lm_head" in shares
    with pipeline.evaluation():
        summed(model)
    assert "lm_head" not in take_underflow_(pipeline)
