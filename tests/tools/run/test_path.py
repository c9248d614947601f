"""The line at a run's start: which path each 2:4 pass takes on this machine, and why."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act24.optim import adamw
from act24.sparse24.feed_forward.operation import FORMS
from act24.tools.run import path
from act24.tools.run.build import build
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.path import path_text
from act24.tools.run.train import train

CPU = torch.device("cpu")
PLAIN = "plain PyTorch (kernels and 2:4 products need a GPU)"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], f"path: CPU, float32, not compiled; activation24 at 2: {PLAIN}"),
        (["passes=[]"], "path: CPU, float32, not compiled"),
        (["train.compile=on", "passes=[]"], "path: CPU, float32, compiled"),
        (
            ['passes=[{use="weight24"}]', "train.dtype=bfloat16"],  # 7 linears a block, two blocks
            f"path: CPU, bfloat16, not compiled; weight24 at 14: {PLAIN}",
        ),
        (
            ['passes=[{use="weight24", scope="mlp"}, {use="fp8"}]', "train.dtype=bfloat16"],
            f"path: CPU, bfloat16, not compiled; weight24 at 6: e4m3 in {PLAIN}; fp8 at 8: e4m3 in {PLAIN}",
        ),
    ],
)
def test_on_a_cpu(tiny, overrides, said):
    recipe = tiny(*overrides)
    assert path_text(build(recipe, CPU).pipeline, recipe, CPU) == said


def test_a_form_that_takes_a_network_is_named(tiny, monkeypatch):
    """As on a GPU, where some networks fit the kernels and others do not: each way is counted."""
    recipe = tiny("model.num_hidden_layers=3", "train.dtype=bfloat16")
    taken = iter((FORMS[0], None, FORMS[0]))
    seen = []
    monkeypatch.setattr(path, "form_of", lambda network, options: seen.append(network) or next(taken))
    text = path_text(build(recipe, CPU).pipeline, recipe, CPU)
    assert text.endswith(f"activation24 at 2: {FORMS[0].says}; activation24 at 1: {PLAIN}")
    # 4 rows of 16 tokens; F is 1.5 times 48, to a multiple of 128; in bfloat16.
    assert [(n.tokens, n.features, n.width, n.width_out) for n in seen] == [(64, 128, 32, 32)] * 3
    assert {n.dtype for n in seen} == {torch.bfloat16}


@pytest.mark.parametrize("reason", ["", "the kernel cast_e4m3 is wrong on this GPU"])
def test_linears_in_e4m3_say_where_their_kernels_do_not_run(tiny, monkeypatch, reason):
    recipe = tiny('passes=[{use="weight24", precision="fp8"}]', "train.dtype=bfloat16")
    pipeline = build(recipe, CPU).pipeline
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(path, "why_in_plain_pytorch", lambda _: reason)
    said = f"e4m3 in plain PyTorch ({reason})" if reason else "products in e4m3"
    assert path_text(pipeline, recipe, torch.device("cuda")).endswith(f"; weight24 at 14: {said}")


WRONG = "the kernel is wrong on this GPU"
MANY = "AdamW takes several passes over memory, some 100 bytes a parameter where one pass is 22: "


@pytest.mark.parametrize(
    ("overrides", "reason", "said"),
    [
        ([], WRONG, ""),  # all in float32: PyTorch's fused kernel
        (["train.dtype=bfloat16", "optimizer.state_dtype=parameter"], WRONG, ""),
        (["train.dtype=bfloat16"], "", ""),
        (["train.dtype=bfloat16"], WRONG, f"{MANY}21 parameters: {WRONG}"),
        (["train.dtype=bfloat16", "optimizer.name=muon"], WRONG, f"{MANY}7 parameters: {WRONG}"),
    ],
)
def test_updates_in_several_passes_say_why(tiny, monkeypatch, overrides, reason, said):
    """Two blocks of seven matrices and two norms, embedding, last norm and head, of which Muon takes the
    blocks' matrices; on a CPU that is taken for a GPU."""
    recipe = tiny("passes=[]", *overrides)
    monkeypatch.setattr(adamw, "why_not_one_pass", lambda _: reason)
    optimizer = build_optimizer(build(recipe, CPU).model, recipe.optimizer)
    assert path.update_text(optimizer, torch.device("cuda")) == said
    assert path.update_text(optimizer, CPU) == ""


def test_what_the_one_pass_does_not_take_is_named_with_its_number(monkeypatch):
    """Transposed storage, moments in bfloat16 that a checkpoint brought, and float64 beside bfloat16."""
    monkeypatch.setattr(adamw, "why_not_one_pass", lambda _: "")
    values = [torch.zeros(3, 2).T, torch.zeros(4), torch.zeros(5), torch.zeros(2).double(), torch.zeros(0)]
    parameters = [torch.nn.Parameter(v if v.dtype == torch.float64 else v.bfloat16()) for v in values]
    optimizer = adamw.AdamW(parameters, lr=0.1)
    optimizer.state[parameters[1]] = {name: torch.zeros(4).bfloat16() for name in adamw.MOMENTS}
    assert path.update_text(optimizer, torch.device("cuda")) == (
        f"{MANY}1 parameters: the kernel takes contiguous tensors; "
        "1 parameters: the kernel has no moments in bfloat16; "
        "1 parameters: the kernel has no parameters in float64"
    )


def test_training_says_it_once_and_writes_it_down(tiny, tmp_path, monkeypatch, capsys):
    said = ("path: here", "AdamW takes several passes")
    monkeypatch.setattr(path, "path_text", lambda *_: said[0])
    monkeypatch.setattr(path, "update_text", lambda *_: said[1])
    train(tiny("train.steps=6", "passes=[]"), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert [lines.count(line) for line in said] == [1, 1]
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.*")).parent)).Reload()
    (written,) = events.Tensors("plan/path/text_summary")
    assert written.tensor_proto.string_val[0].decode() == "\n\n".join(said)
