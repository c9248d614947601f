"""The option `head` of the pass `fp8`: the head in the model and in the loss that multiplies past it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from slow import slow_after
from torch import Tensor, nn
from toys import llama, tokens

from act24.errors import Act24Error, PassError
from act24.fp8.linear import linear_fp8
from act24.llama import LlamaForCausalLM
from act24.loss import cross_entropy_sum
from act24.passes import Activation24, ActivationStatistics, Fp8, Pass, Relu2FFN, Weight24, apply_, plan
from act24.passes.fp8 import PARTS, head_arguments
from act24.tools.run.step import SummedLoss
from act24.tools.watch.fp8_watch import take_underflow_


def head_row(model: nn.Module, *passes: Pass) -> list[str]:
    return [row.after for row in plan(model, passes).rows if row.fqn == "lm_head"]


def summed(model: LlamaForCausalLM) -> Tensor:
    """The loss as the training loop takes it, which multiplies with the head's weight itself."""
    ids = tokens() % 64
    return SummedLoss(model)(ids, ids.roll(-1, 1))[0]


def e4m3_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_fp8(hidden, weight, None, exact_grad_x=True)


def test_the_head_is_taken_by_option_or_name_and_by_nothing_else() -> None:
    e4m3 = ["e4m3 in y, dW, rowwise"]
    for p, expected in (
        (Fp8(), []),
        (Fp8(head=True), e4m3),
        (Fp8(targets=("*", "lm_head")), e4m3),
        (Fp8(head=True, targets=("*mlp*",)), e4m3),
        (Fp8(head=True, scaling="tensorwise"), ["e4m3 in y, dW, tensorwise"]),
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


@pytest.mark.parametrize("keep", slow_after(1, [False, True]))
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
    whole, past, found, pipelines = llama(vocab_size=64), llama(vocab_size=64), [], []

    def drawn_from(model: LlamaForCausalLM) -> list[Tensor]:
        return [b for n, b in model.named_buffers() if n.endswith("24_seed")]

    for other, run in ((whole, lambda m: m(tokens() % 64)), (past, lambda m: m.model(tokens() % 64))):
        pipelines.append(apply_(other, passes))
        pipelines[-1].begin_update_(0)
        places = drawn_from(other)
        values = []
        for _ in range(3):
            run(other)
            values.append(torch.stack(places).clone())
        assert len({tuple(v.flatten().tolist()) for v in values}) == 3
        found.append(torch.stack(values))
    assert torch.equal(*found)
    for run in (lambda: whole(tokens() % 64), lambda: whole.model(tokens() % 64)):
        before, active = torch.stack(list(drawn_from(whole))), pipelines[0].active
        whole.eval()
        run()
        assert pipelines[0].active == active  # evaluation has ended with its forward
        assert torch.equal(torch.stack(list(drawn_from(whole))), before)
        whole.train()
        run()
        assert not torch.equal(torch.stack(list(drawn_from(whole))), before)
    model = llama(vocab_size=64)
    apply_(model, passes)
    with pytest.raises(Act24Error, match="nobody began"):
        model.model(tokens() % 64)


def test_what_becomes_zero_of_the_head_s_input_is_counted_in_the_loop() -> None:
    model = llama(vocab_size=64)
    pipeline = apply_(model, [Fp8(head=True), ActivationStatistics(optional=True)])
    pipeline.begin_update_(0)
    summed(model).backward()
    (counted,) = (b for n, b in model.named_buffers() if n == "lm_head.weight_e4m3_gradient_counts")
    assert int(counted[0]) == tokens().numel() * 64  # no entry is zero; dX reads them as they are
    shares = take_underflow_(pipeline)
    assert {"lm_head", "gradient/lm_head"} <= shares.keys()
    with pipeline.evaluation():
        summed(model)
    assert "lm_head" not in take_underflow_(pipeline)
