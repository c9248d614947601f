"""What TensorBoard's own reader finds in the event files is what was logged, under the right names."""

import json
import logging
import os
import re
import resource
import shlex
import threading
import time
from pathlib import Path

import numpy
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator, plugin_event_multiplexer
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import backend_context
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from act24.tools.watch import heatmap
from act24.tools.watch.tensorboard import RunLog, flat, open_hint

MODULES = ("attn_q_proj", "attn_k_proj", "attn_v_proj", "attn_o_proj", "mlp_up_proj", "mlp_down_proj")
LAYER_TAGS = ("sparsity_relu/*", *(f"weight_sparsity/*/{module}" for module in MODULES))


def read(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def points(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def test_names_and_values_are_those_of_the_issue(tmp_path):
    log = RunLog(tmp_path, layer_tags=LAYER_TAGS)
    log.scalars({"loss/train": 2.5, "optim/lr": 1e-3, "perf/tokens_per_s": 1e6}, 10)
    log.layers("sparsity_relu/*", dict(enumerate([0.25, 0.5, 0.9])), 10)
    for module in MODULES:
        log.layers(f"weight_sparsity/*/{module}", dict(enumerate([0.0, 0.5, 0.5])), 10)
    log.text("recipe", "```toml\nsteps = 3\n```")
    log.close()
    events = read(tmp_path)
    expected = {"loss/train": 2.5, "optim/lr": 1e-3, "perf/tokens_per_s": 1e6}
    expected |= {"sparsity_relu/layer_0": 0.25, "sparsity_relu/layer_1": 0.5, "sparsity_relu/layer_2": 0.9}
    expected |= {
        "sparsity_relu/mean_across_layers": 0.55,
        "sparsity_relu/min_across_layers": 0.25,
        "sparsity_relu/max_across_layers": 0.9,
    }
    for module in MODULES:
        statistics = {"layer_0": 0.0, "layer_1": 0.5, "layer_2": 0.5}
        statistics |= {"mean_across_layers": 1 / 3, "min_across_layers": 0.0, "max_across_layers": 0.5}
        expected |= {f"weight_sparsity/{name}/{module}": value for name, value in statistics.items()}
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        assert points(events, tag) == {10: pytest.approx(value, rel=1e-6)}
    assert set(events.Tags()["images"]) == {tag.replace("*", "heatmap") for tag in LAYER_TAGS}
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "```toml\nsteps = 3\n```"


def test_the_layout_s_charts_hold_their_tags_and_no_others(tmp_path):
    log = RunLog(tmp_path, layer_tags=LAYER_TAGS)
    log.scalars({"loss/train": 1.0, "loss/val": 1.0, "loss/train_smoothed": 1.0}, 0)
    for tag in LAYER_TAGS:
        log.layers(tag, dict(enumerate([0.5] * 12)), 0)
    log.close()
    events = read(tmp_path)
    tags = events.Tags()["scalars"]
    page = layout_pb2.Layout()
    page.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])

    def lines(chart):  # the server takes re.match, from the start of the tag
        return {tag for tag in tags for pattern in chart.multiline.tag if re.match(pattern, tag)}

    charts = {(category.title, chart.title): chart for category in page.category for chart in category.chart}
    assert lines(charts["loss", "train and held-out"]) == {"loss/train", "loss/val"}
    for tag in LAYER_TAGS:
        group = tag.split("/")[0]
        every_layer = {tag.replace("*", f"layer_{layer}") for layer in range(12)}
        assert lines(charts[group, f"{tag}: every layer"]) == every_layer
        (band,) = charts[group, f"{tag}: mean, smallest to largest"].margin.series
        assert (band.value, band.lower, band.upper) == tuple(
            tag.replace("*", f"{name}_across_layers") for name in ("mean", "min", "max")
        )
        assert {band.value, band.lower, band.upper} <= set(tags)
    assert len(charts) == 4 + 2 * len(LAYER_TAGS)
    categories = [category.title for category in page.category]
    assert categories[:3] == ["loss", "rates", "sparsity_relu"]


def test_what_is_the_same_everywhere_has_no_picture(tmp_path):
    log = RunLog(tmp_path)
    for step in range(3):
        log.layers("sparsity_relu/*", {0: 0.0, 1: 0.0}, step)
        log.layers("sparsity_dropped_energy/*", {0: 0.0, 1: float(step == 2)}, step)
    log.close()
    events = read(tmp_path)
    assert events.Tags()["images"] == ["sparsity_dropped_energy/heatmap"]
    assert [event.step for event in events.Images("sparsity_dropped_energy/heatmap")] == [2]


def test_hyperparameters_are_in_the_run_itself_and_make_up_no_points(tmp_path):
    recipe = {
        "train": {"steps": 5, "dtype": "float32"},
        "passes": [{"use": "cola", "rank": 8}, {"use": "relu2_ffn"}],
    }
    log = RunLog(tmp_path)
    log.hparams(recipe | {"optimizer": {"betas": (0.9, 0.95)}, "missing": None, "on": True})
    log.scalars({"loss/val": 3.0}, 5)
    log.close()
    events = read(tmp_path)
    metadata = events.summary_metadata
    start = HParamsPluginData()
    start.ParseFromString(metadata[hparams_metadata.SESSION_START_INFO_TAG].plugin_data.content)
    given = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in start.session_start_info.hparams.items()
    }
    assert given == {
        "train.steps": 5,
        "train.dtype": "float32",
        "passes.0.use": "cola",
        "passes.0.rank": 8,
        "passes.1.use": "relu2_ffn",
        "optimizer.betas.0": 0.9,
        "optimizer.betas.1": 0.95,
        "on": True,
    }
    assert points(events, "loss/val") == {5: 3.0}
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # no run of its own


def test_hparams_opens_on_what_differs(tmp_path):
    """As TensorBoard's own server orders it; the first run has no CoLA."""
    for run, passes in (("a", {}), ("b", {"cola": {"mlp_rank": 8}}), ("c", {"cola": {"mlp_rank": 16}})):
        log = RunLog(tmp_path / run)
        log.hparams({"checkpoint": {"every": 5}, "passes": passes, "optimizer": {"lr": 1.0 + (run == "a")}})
        log.scalars({"loss/train": 1.0, "perf/step_ms": 1.0, "sparsity_relu/layer_0": 0.5}, 1)
        log.close()
    runs = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    provider = MultiplexerDataProvider(runs.Reload(), str(tmp_path))
    page = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(tmp_path)))
    context = RequestContext()
    experiment = page.experiment_from_metadata(
        context, "", True, page.hparams_metadata(context, ""), page.hparams_from_data_provider(context, "", 0)
    )
    names = [info.name for info in experiment.hparam_infos]
    assert names == ["optimizer.lr", "passes.cola.mlp_rank", "checkpoint.every"]
    assert experiment.metric_infos[0].name.tag == "loss/train"


def test_what_lies_after_the_checkpoint_is_hidden_on_resume(tmp_path):
    log = RunLog(tmp_path, layer_tags=["sparsity_relu/*"])
    for step in range(1, 8):
        log.scalars({"loss/train": step}, step)
        log.layers("sparsity_relu/*", dict(enumerate([step / 10, step / 20])), step)
        if step == 5:
            log.flush()
            state = json.loads(json.dumps(log.state()))  # what the checkpoint after step 5 keeps
    log.close()
    resumed = RunLog(tmp_path, layer_tags=["sparsity_relu/*"], resumed_from=5, state=state)
    resumed.scalars({"loss/train": 60}, 6)
    resumed.layers("sparsity_relu/*", dict(enumerate([0.0, 1.0])), 6)
    resumed.close()
    events = read(tmp_path)
    assert points(events, "loss/train") == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 60}
    assert points(events, "sparsity_relu/layer_1")[6] == 1.0
    page = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()  # the server's, with other rules
    assert [event.step for event in page.Tensors("loss/train")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in page.Tensors("sparsity_relu/heatmap")] == [1, 2, 3, 4, 5, 6]
    pictures = {event.step: event for event in events.Images("sparsity_relu/heatmap")}
    assert sorted(pictures) == [1, 2, 3, 4, 5, 6]
    assert resumed.state()["sparsity_relu/*"]["columns"] == [[s / 10, s / 20] for s in range(1, 6)] + [
        [0.0, 1.0]
    ]


def test_a_new_run_in_an_old_folder_hides_the_old_one(tmp_path, monkeypatch):
    # Files of one second are told apart by a count of the process, in whose names 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for value in (1.0, 2.0):
        log = RunLog(tmp_path)
        log.scalars({"loss/train": value}, 0)
        log.close()
    assert points(read(tmp_path), "loss/train") == {0: 2.0}


@pytest.mark.parametrize("back", [86400, 0], ids=["a day", "the same second, a lower process number"])
def test_a_clock_that_goes_back_hides_nothing_of_the_run_that_went_on(tmp_path, monkeypatch, back):
    """Readers sort event files by name, which is the clock, the host and the process number."""
    now = [time.time()]
    monkeypatch.setattr(event_file_writer.time, "time", lambda: now[0])
    for start, (first, last, value) in enumerate([(1, 20, 1.0), (11, 30, 2.0), (26, 40, 3.0)]):
        monkeypatch.setattr(os, "getpid", lambda start=start: 900 - start)
        log = RunLog(tmp_path, resumed_from=first - 1 if start else None)
        for step in range(first, last + 1):
            log.scalars({"loss/train": value}, step)
        log.close()
        now[0] -= back
    steps = {step: 1.0 if step < 11 else 2.0 if step < 26 else 3.0 for step in range(1, 41)}
    assert points(read(tmp_path), "loss/train") == steps
    page = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in page.Tensors("loss/train")] == list(steps)
    assert event_file_writer.time is time


def test_the_heatmap_in_the_file_is_the_picture(tmp_path):
    log = RunLog(tmp_path)
    log.layers("sparsity_relu/*", dict(enumerate([0.1, 0.9])), 3)
    log.close()
    (event,) = read(tmp_path).Images("sparsity_relu/heatmap")
    (tmp_path / "picture.png").write_bytes(event.encoded_image_string)
    pixels = numpy.asarray(Image.open(tmp_path / "picture.png"))
    assert pixels[heatmap.ROW // 2, 400].tolist() == [0, 0, 4]  # layer 0, the smallest: darkest
    assert pixels[heatmap.ROW + 5, 400].tolist() == [252, 255, 164]  # layer 1, the largest: brightest


def test_closing_twice_is_closing_once(tmp_path):
    log = RunLog(tmp_path)
    log.scalars({"loss/train": 1.0}, 1)
    log.close()
    files = sorted(tmp_path.iterdir())
    log.close()
    assert sorted(tmp_path.iterdir()) == files
    assert points(read(tmp_path), "loss/train") == {1: 1.0}


@pytest.mark.parametrize("room", [10, 2_000], ids=["as it is opened", "later"])
def test_a_full_disk_ends_the_log_with_one_warning_and_not_the_run(tmp_path, caplog, monkeypatch, room):
    """TensorBoard's writer thread used to print a traceback, and what was lost was not counted."""
    shown = []
    monkeypatch.setattr("threading.excepthook", shown.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING, "act24"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            log = RunLog(tmp_path)
            for step in range(200):
                log.text("sample", "x" * 100, step)
                log.flush()
            log.close()
            log.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    written = read(tmp_path).Tensors("sample/text_summary") if room > 100 else []
    lost = 200 - len(written)
    assert 150 < lost <= 200
    assert [record.message for record in caplog.records if record.name == "act24"] == [
        "nothing more is written for TensorBoard: [Errno 27] File too large",
        f"TensorBoard lacks {lost} groups of values, pictures and texts",
    ]
    assert log.broken
    assert shown == []
    assert threading.excepthook == shown.append  # of before


def test_threads_of_others_still_say_how_they_failed(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("threading.excepthook", shown.append)
    log = RunLog(tmp_path)

    def fails():
        raise OSError("a disk of somebody else")

    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    log.close()
    assert [str(failed.exc_value) for failed in shown] == ["a disk of somebody else"]


def test_nested_tables_get_dotted_names():
    assert flat({"a": {"b": 1}, "c": [{"d": "x"}, 2.0], "e": {}}) == {"a.b": 1, "c.0.d": "x", "c.1": 2.0}


def test_the_hint_is_a_command_that_a_shell_takes_apart_rightly(tmp_path):
    run = tmp_path / "my runs" / "demo"
    program, option, folder = shlex.split(open_hint(run))
    assert Path(program).name == "tensorboard"
    assert (option, folder) == ("--logdir", str(run))
    assert Path(program).is_absolute() is (program != "tensorboard")


def test_the_hint_names_the_environment_s_own_program_off_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    beside_python = tmp_path / "venv" / "tensorboard"
    beside_python.parent.mkdir()
    beside_python.touch()
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv" / "python"))
    assert open_hint(Path("runs/demo")) == f"{beside_python} --logdir runs/demo"
