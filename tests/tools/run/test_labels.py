"""What is logged and what is applied, seen from outside: files that were written, values that were met."""

import dataclasses

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.data import Batch, open_rows, open_tokenizer
from act24.tools.run import train as train_module
from act24.tools.run.build import load
from act24.tools.run.train import train
from act24.tools.watch import monitor as monitor_module

RECIPE = ("train.steps=8", "schedule.warmup_steps=2", "eval.every=0", "eval.tokens=100")


def events_of(run_dir):
    return EventAccumulator(str(run_dir), {"scalars": 0, "tensors": 0}).Reload()


def logged(run_dir, tag):
    return [(event.step, event.value) for event in events_of(run_dir).Scalars(tag)]


def test_layers_are_the_models(tiny, tmp_path):
    """A recipe that rewrites layers 2 and 3 only used to write layers 0 and 1."""
    recipe = tiny(
        *RECIPE,
        "model.num_hidden_layers=4",
        'passes=[{use="relu2_ffn", targets=["model.layers.2.*", "model.layers.3.*"]}]',
        "log.weight_sparsity_every=4",
    )
    train(recipe, tmp_path)
    tags = events_of(tmp_path).Tags()["scalars"]
    labels = {tag.partition("/")[2] for tag in tags if tag.startswith("sparsity_relu/layer_")}
    assert labels == {"layer_2", "layer_3"}
    assert not any(tag.startswith("weight_sparsity") for tag in tags)  # none of them is sparse
    state = checkpoint_folder.latest(tmp_path) / "state.json"
    assert '"layers": [\n     2,\n     3\n    ]' in state.read_text()


def test_each_layer_has_its_own_values(tiny, tmp_path):
    """Zeros are put into the weights, more in each layer; the log shows them where they are."""
    shares = {0: 0.1, 1: 0.3, 2: 0.6}
    recipe = tiny(*RECIPE, "model.num_hidden_layers=3", "log.weight_sparsity_every=8", "optimizer.lr=1e-9")
    make = train_module.TrainingStep

    def with_zeros(model, *arguments):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers." in name and "mlp" in name:
                    layer = int(name.split("layers.")[1].split(".")[0])
                    parameter.view(-1)[: round(shares[layer] * parameter.numel())] = 0.0
                    parameter.register_hook(torch.zeros_like)
        return make(model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "TrainingStep", with_zeros)
        train(recipe, tmp_path)
    for layer, share in shares.items():
        ((_, value),) = logged(tmp_path, f"weight_sparsity/layer_{layer}/mlp_up_proj")
        assert value == pytest.approx(share, abs=0.01)


def test_bottlenecks_have_what_the_networks_have(tiny, tmp_path):
    """CoLA's: every tag, in the charts, the pictures and the events; an alarm can name nothing else. And
    TensorBoard, which sorts groups by name, opens on the loss: then come rates, then sparsity."""
    passes = (
        'passes=[{use="relu2_ffn"}, {use="cola", attn_rank=8, mlp_rank=8, bottleneck="relu2"}, '
        '{use="activation24", from_step=1, backward="split_gemm", method="soft_dynamic"}]'
    )
    short = ("train.steps=2", "schedule.warmup_steps=1")
    train(tiny(*RECIPE, *short, passes), tmp_path)
    events = events_of(tmp_path)
    tags, charts = events.Tags()["scalars"], layout_pb2.Layout()
    charts.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charted = {series.value for c in charts.category for chart in c.chart for series in chart.margin.series}
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    of_networks = {t.partition("/")[0] for t in tags if t.endswith("/mean_across_layers") and t[:2] == "sp"}
    assert of_networks >= {"sparsity_relu", "sparsity_dropped_energy", "sparsity_feature_dropped_energy"}
    assert "sparsity_scale" in of_networks
    for group in of_networks:
        assert {f"{group}/mean_across_layers/{linear}" for linear in linears} <= {*tags} & charted
    for group in ("sparsity_relu", "sparsity_dropped_energy"):
        assert {f"{group}/heatmap/{linear}" for linear in linears} <= {*events.Tags()["images"]}
    assert charted <= {*tags}  # no chart stays empty
    groups = sorted({tag.partition("/")[0] for tag in tags} - {"lowrank_relu2_sparsity", "text"})
    assert groups[:3] == ["loss", "optim", "perf"]
    assert all(group.startswith("sparsity_") for group in groups[3:])


def test_weight_sparsity_is_written_when_it_is_due(tiny, tmp_path):
    """Also off the grid of log.every, whose windows stay as they are."""
    sparse = 'passes=[{use="weight24"}]'
    train(tiny(*RECIPE, sparse, "log.every=4", "log.weight_sparsity_every=3"), tmp_path)
    assert [step for step, _ in logged(tmp_path, "weight_sparsity/layer_1/mlp_up_proj")] == [3, 6]
    assert [step for step, _ in logged(tmp_path, "loss/train")] == [4, 8]


def alarms_of(run_dir):
    events = events_of(run_dir)
    return [event.step for event in events.Tensors("alarms/text_summary")]


def test_alarms_are_said_once_also_when_a_run_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_module, "alarms", lambda sites: ["too much is dropped"] if sites else [])
    recipe = tiny(*RECIPE, "passes.activation24.from_step=2", "checkpoint.every=4", "checkpoint.keep=9")
    train(recipe, tmp_path / "straight")
    assert alarms_of(tmp_path / "straight") == [3]
    begun = checkpoint_folder.folder_of(tmp_path / "straight", 4)
    train(recipe, tmp_path / "resumed", resume=str(begun))
    assert "alarms/text_summary" not in events_of(tmp_path / "resumed").Tags()["tensors"]


def test_an_alarm_comes_again_after_it_was_quiet(tiny, tmp_path, monkeypatch):
    windows = []

    def now_and_then(sites):
        windows.append(sites)
        return ["too much is dropped"] if len(windows) in (1, 2, 4) else []

    monkeypatch.setattr(monitor_module, "alarms", now_and_then)
    train(tiny(*RECIPE, "passes.activation24.from_step=2"), tmp_path)
    assert alarms_of(tmp_path) == [3, 6]


def test_the_learning_rate_is_that_of_every_group(tiny, tmp_path, monkeypatch):
    applied = []
    make = train_module.build_optimizer

    def watched(*arguments, **options):
        optimizer = make(*arguments, **options)
        optimizer.register_step_pre_hook(
            lambda *_: applied.append([group["lr"] for group in optimizer.param_groups])
        )
        return optimizer

    monkeypatch.setattr(train_module, "build_optimizer", watched)
    train(tiny(*RECIPE), tmp_path)
    rates = [value for _, value in logged(tmp_path, "optim/lr")]
    assert len(applied[0]) > 1
    assert len(set(rates)) > 4
    for groups, rate in zip(applied, rates, strict=True):
        assert groups == pytest.approx([rate] * len(groups))


def test_the_logged_gradient_norm_is_the_mean_of_its_steps(tiny, tmp_path):
    train(tiny(*RECIPE), tmp_path / "each")
    train(tiny(*RECIPE, "log.every=4"), tmp_path / "windows")
    each = dict(logged(tmp_path / "each", "optim/grad_norm"))
    for step, norm in logged(tmp_path / "windows", "optim/grad_norm"):
        assert norm == pytest.approx(sum(each[s] for s in range(step - 3, step + 1)) / 4)


def test_micro_batches_and_steps_have_seeds_of_their_own(tiny, tmp_path, monkeypatch):
    from act24.tools.run.step import SummedLoss

    seeds = []
    forward = SummedLoss.forward

    def watched(self, input_ids, labels):
        loss = forward(self, input_ids, labels)
        if self.training:
            buffers = self.named_buffers()
            seeds.append(tuple(int(value) for name, value in buffers if name.endswith("activation24_seed")))
        return loss

    monkeypatch.setattr(SummedLoss, "forward", watched)
    passes = 'passes=[{use="relu2_ffn"}, {use="activation24", method="mvue", backward="sparse"}]'
    train(tiny(*RECIPE, "train.steps=3", passes), tmp_path)
    assert len(seeds) == 6  # two micro-batches a step
    assert all(seeds)
    assert len({seed for step in seeds for seed in step}) == sum(len(step) for step in seeds)


def test_the_last_token_of_a_short_row_is_no_padding():
    """Rows of 4, 3 and 1 tokens, of which the last predicts nothing and is looked at all the same."""
    labels = torch.tensor([[2, 3, 4, 5], [2, 3, -100, -100], [-100, -100, -100, -100]])
    pads = Batch(torch.zeros_like(labels), labels).pads
    assert pads.tolist() == [[False] * 4, [False, False, False, True], [False, True, True, True]]


def test_what_was_measured_on_is_trained_on(tiny, tmp_path, monkeypatch):
    """LoST scores columns on the first batch; the first step has the same rows, and the second the next."""
    recipe = tiny(
        *RECIPE,
        "train.steps=2",
        "schedule.warmup_steps=0",
        'passes=[{use="relu2_ffn"}, {use="lost", attn_rank=8, mlp_rank=8, method="gradient"}]',
        "optimizer.name=lost_adamw",
    )
    seen = []
    from act24.tools.run.step import TrainingStep

    original = TrainingStep.__call__

    def watched(self, batches, *arguments):
        seen.extend(batch.input_ids for batch in batches)
        return original(self, batches, *arguments)

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    train(recipe, tmp_path)
    tokenizer = open_tokenizer(recipe.data, recipe.tokenizer)
    with open_rows(recipe.data, tokenizer, batch_size=4, vocab_size=300) as rows:
        expected = [next(rows).input_ids for _ in range(4)]
    assert torch.equal(torch.cat(seen), torch.cat(expected))


def test_the_tokens_of_a_run_are_those_it_trained_on(tiny, tmp_path):
    outcome = train(tiny(*RECIPE, 'data.rows="padded"'), tmp_path)
    assert dataclasses.is_dataclass(outcome)
    assert 0 < outcome.tokens < 8 * 8 * 16 + 1
    assert load(tmp_path).step == 8
