"""A run goes on from a checkpoint bit for bit, and no kill and no full disk costs the checkpoint before."""

import errno
import itertools
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints.manifest import CheckpointError

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Tiny(nn.Module):
    """Tied weights, a persistent and a passing buffer, dropout (random numbers), a transposed weight."""

    def __init__(self, seed, width=16, vocabulary=32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.down.weight = nn.Parameter(torch.randn(3 * width, width).t() * 0.1)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("passing", torch.zeros(3), persistent=False)

    def forward(self, ids):
        hidden = self.embed(ids)
        hidden = hidden + self.down(nn.functional.dropout(self.up(hidden).relu().square(), 0.1))
        self.scale += 0.5
        return self.head(hidden) * self.scale.to(hidden.dtype)


def adamw(model, **options):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, **options)


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 32, (4, 9)).to(model.scale.device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(run, step, model, optimizer, **changed):
    given = {
        "state": {"tokens": 32 * step},
        "rank_state": {"offset": step, "remainder": [1, 2]},
        "recipe_text": 'description = "π"\n',
        "tokenizer_json": "{}",
        "plan": {"up": "relu2"},
        "keep": 2,
    }
    return checkpoint.save(run, step, model=model, optimizer=optimizer, **(given | changed))


def assert_equal(model, other, optimizer, other_optimizer):
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[ours].keys() == other_optimizer.state[theirs].keys()
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other_optimizer.state[theirs][key]), key


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, options, dtype, device):
    model = Tiny(0).to(device, dtype)
    optimizer = adamw(model, **options)
    train(model, optimizer, 3)
    folder = save(tmp_path, 3, model, optimizer)
    straight = train(model, optimizer, 4)

    other = Tiny(1).to(device, dtype)
    other_optimizer = adamw(other, **options)
    torch.rand(5)
    loaded = checkpoint.load(folder)
    assert checkpoint.restore_(loaded, other, other_optimizer) == {"offset": 3, "remainder": [1, 2]}
    assert train(other, other_optimizer, 4) == straight
    assert_equal(model, other, optimizer, other_optimizer)
    assert (loaded.step, loaded.state, loaded.plan) == (3, {"tokens": 96}, {"up": "relu2"})
    assert loaded.recipe_text == 'description = "π"\n'
    assert other.head.weight is other.embed.weight
    assert other_optimizer.param_groups[0]["params"][0] is other.embed.weight


def test_a_second_resume_and_a_start_from_nothing_are_exact(tmp_path):
    model = Tiny(0)
    optimizer = adamw(model)
    save(tmp_path, 0, model, optimizer)
    straight = train(model, optimizer, 5)
    losses = []
    for step in (0, 2):
        other = Tiny(9)
        other_optimizer = adamw(other)
        checkpoint.restore_(checkpoint.load(checkpoint_folder.latest(tmp_path)), other, other_optimizer)
        losses += train(other, other_optimizer, 2 if step == 0 else 3)
        save(tmp_path, len(losses), other, other_optimizer)
    assert losses == straight
    assert_equal(model, other, optimizer, other_optimizer)


def test_weights_are_stored_once_and_in_the_common_format(tmp_path):
    model = Tiny(0)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    folder = save(tmp_path, 1, model, optimizer)
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == {"embed.weight", "up.weight", "up.bias", "down.weight", "scale"}  # head is tied
    for name, value in weights.items():
        assert torch.equal(value, model.state_dict()[name])
    other = Tiny(5)
    checkpoint.load_weights_(checkpoint.load(folder), other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["world_size"] == 1
    assert manifest["versions"]["torch"] == torch.__version__


def test_whoever_may_read_one_file_may_read_all(tmp_path):
    """Weights were for their owner alone: a colleague's `eval` of a shared run met "Permission denied"."""
    model = Tiny(0)
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1, model, adamw(model))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert checkpoint.WEIGHTS in modes
    assert set(modes.values()) == {0o640}


def test_a_checkpoint_of_another_recipe_is_refused_with_the_differences_and_changes_nothing(tmp_path):
    model = Tiny(0)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    loaded = checkpoint.load(save(tmp_path, 1, model, optimizer))

    def refused(other, *parts):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        other_optimizer = adamw(other)
        for attempt in (
            lambda: checkpoint.load_weights_(loaded, other),
            lambda: checkpoint.restore_(loaded, other, other_optimizer),
        ):
            with pytest.raises(CheckpointError, match="checkpoint of another recipe") as error:
                attempt()
            for part in parts:
                assert part in str(error.value)
            assert "\n" not in str(error.value)
        assert not other_optimizer.state
        for name, value in other.state_dict().items():
            assert torch.equal(value, before[name])

    refused(
        Tiny(1, width=8),
        "embed.weight is float32 [32, 16] in the checkpoint and float32 [32, 8] in the model",
    )
    refused(Tiny(1).bfloat16(), "up.weight is float32 [48, 16] in the checkpoint and bfloat16", "and 2 more")
    renamed = Tiny(1)
    renamed.gate, renamed.up = renamed.up, nn.Identity()
    refused(renamed, "gate.weight is absent in the checkpoint", "and 1 more")

    states = torch.get_rng_state()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(CheckpointError, match="another optimizer: AdamW over 3"):
        checkpoint.restore_(loaded, model, sgd)
    assert torch.equal(torch.get_rng_state(), states)


def test_every_file_is_covered_by_the_manifest(tmp_path):
    model = Tiny(0)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    folder = save(tmp_path, 1, model, optimizer)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {".metadata", "model.safetensors", "rank-00000.json", "plan.json"}
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        for damaged in (
            whole[:middle] + bytes([whole[middle] ^ 0x10]) + whole[middle + 1 :],
            whole[:middle],
            None,
        ):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as error:
                checkpoint.load(folder)
            assert path.name in str(error.value)
        path.write_bytes(whole)
    checkpoint.load(folder)


@pytest.fixture
def run_with_one_checkpoint(tmp_path):
    model = Tiny(0, width=64)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    save(tmp_path, 1, model, optimizer)
    train(model, optimizer, 1)
    return tmp_path, model, optimizer


def assert_refused_and_unharmed(run, model, optimizer, reason):
    with pytest.raises(CheckpointError) as error:
        save(run, 2, model, optimizer, keep=1)
    assert "step 2 could not be saved" in str(error.value)
    assert reason in str(error.value)
    assert str(run / "checkpoints" / "step-000001") in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    checkpoint.load(checkpoint_folder.latest(run))


@pytest.mark.parametrize("limit", [0, 30_000, 150_000], ids=["text", "weights", "moments"])
def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint(run_with_one_checkpoint, limit):
    """The kernel itself refuses the write: every file is limited, so another file is the first that fails."""
    run, model, optimizer = run_with_one_checkpoint
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoints" / "step-000001").rglob("*")}
    assert sizes["rank-00000.json"] < 30_000 < sizes["model.safetensors"] < 150_000 < sizes["__0_0.distcp"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        assert_refused_and_unharmed(run, model, optimizer, os.strerror(errno.EFBIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(run, 2, model, optimizer)


def test_a_full_disk_at_any_sync_leaves_the_last_checkpoint(
    run_with_one_checkpoint, monkeypatch, tmp_path_factory
):
    run, model, optimizer = run_with_one_checkpoint
    fsync = os.fsync
    done, full_at = 0, 0

    def fill_up(descriptor):
        nonlocal done
        done += 1
        if done == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    save(tmp_path_factory.mktemp("other"), 2, model, optimizer)
    before_the_rename = done - 1  # the last one is for the folder in which the rename took place
    assert before_the_rename > 10
    for position in range(1, before_the_rename + 1):
        done, full_at = 0, position
        assert_refused_and_unharmed(run, model, optimizer, "No space left on device")


def test_a_missing_permission_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    model = Tiny(0)
    with pytest.raises(CheckpointError, match=r"Not a directory.*there is no older checkpoint"):
        save(tmp_path, 1, model, adamw(model))


def test_what_does_not_fit_into_json_is_a_bug_and_writes_nothing(tmp_path):
    model = Tiny(0)
    with pytest.raises(TypeError):
        save(tmp_path, 1, model, adamw(model), state={"loss": torch.tensor(1.0)})
    assert not list(tmp_path.iterdir())


AT_EVERY_MOMENT = """
import json, os, pathlib, shutil, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_checkpoint import Tiny, adamw, save, train
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder

folder, before, what = pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = Tiny(0); optimizer = adamw(model); train(model, optimizer, 1)
(folder / "as it was").mkdir()
if before:
    save(folder / "as it was", before, model, optimizer, state={"tokens": 32})
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")

def read(run):
    # The last checkpoint, as it is found, and what it says.
    latest = checkpoint_folder.latest(run)
    return latest and latest.name, latest and checkpoint.load(latest).state["tokens"]

def save_in_a_child(run, at_each_touch):
    # A save that calls a function at each of its touches of the file system.
    child = os.fork()
    if child == 0:
        within = False
        def hook(event, arguments):
            nonlocal within
            if event in EVENTS and str(run) in str(arguments[0]) and not within:
                within = True
                at_each_touch()
                within = False
        sys.addaudithook(hook)
        save(run, 2, model, optimizer, keep=1, state={"tokens": 64})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

seen = []
if what == "read":
    run = folder / "as it was"
    def look():
        with open(folder / "seen", "a") as file:
            print(json.dumps(read(run)), file=file)
    assert save_in_a_child(run, look) == 0
    seen = [json.loads(line) for line in (folder / "seen").read_text().splitlines()]
for fatal in range(1, 1000) if what == "kill" else ():  # the first child at its first touch, and so on
    run = folder / str(fatal)
    shutil.copytree(folder / "as it was", run)
    touches = iter(range(1, 1000))
    status = save_in_a_child(run, lambda: next(touches) == fatal and os.kill(os.getpid(), signal.SIGKILL))
    assert status in (0, -signal.SIGKILL), status
    seen.append(read(run))
    checkpoint_folder.put_back(run)
    if latest := checkpoint_folder.latest(run):
        assert (latest.name, seen[-1][1]) == (seen[-1][0].partition(".")[0], read(run)[1])
        other = Tiny(1)
        checkpoint.restore_(checkpoint.load(latest), other, adamw(other))
    checkpoint_folder.prune(run, keep=1)
    assert checkpoint_folder.all_of(run) == ([latest] if latest else [])
    if status == 0:
        break
    shutil.rmtree(run)
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("before", "what"),
    [
        pytest.param(before, what, marks=[pytest.mark.slow] * (before > 0 or what == "kill"))
        for before in (0, 1, 2)  # a first save, the next, and one of a step that has been saved
        for what in ("kill", "read")
    ],
)
def test_at_any_moment_of_a_save_there_is_a_whole_checkpoint(tmp_path, before, what):
    """A child is killed at its first touch of the file system, another at its second, until one survives; or
    somebody else looks at each: it is the checkpoint of before up to some moment, and then the new one."""
    script = [sys.executable, "-c", AT_EVERY_MOMENT, str(Path(__file__).parents[1])]
    # Without a GPU: torch.distributed.checkpoint would start CUDA, which no fork survives.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    arguments = [*script, str(tmp_path), str(before), what]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    seen = [(name and re.sub("tmp-.*", "tmp", name), tokens) for name, tokens in json.loads(result.stdout)]
    old = (f"step-{before:06d}", 32) if before else (None, None)
    new = ("step-000002.tmp", 64), ("step-000002", 64)
    assert [found for found, _ in itertools.groupby(seen)] == [old, *new]
    assert seen.count(old) > 20
    assert all(seen.count(found) > 2 for found in new)
