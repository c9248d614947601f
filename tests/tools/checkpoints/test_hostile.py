"""A checkpoint whose manifest is valid and whose files are hostile: nothing runs, and the file is named."""

import io
import json
import pickle
import pkgutil
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import load_tiny
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from act24.errors import Act24Error
from act24.recipes.load import parse_recipe
from act24.tools.checkpoints import checkpoint, reading
from act24.tools.checkpoints.manifest import MANIFEST, CheckpointError, contents, fingerprints, render
from act24.tools.checkpoints.reading import contents_of
from act24.tools.data import open_rows
from act24.tools.run.build import load, tokenizer_of_run
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.saved import position_of, saved_position, saved_state
from act24.tools.run.train import train

OVERRIDES = ("train.steps=4", "schedule.warmup_steps=0", "checkpoint.every=2")
DEEP = "[" * 100_000
MODEL = "model.safetensors"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture(scope="module")
def a_run(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("hostile") / "run"
    train(load_tiny(tiny_file, *OVERRIDES), run_dir)
    return run_dir


@pytest.fixture
def copied(a_run, tmp_path):
    """The checkpoint after step 2 of a copy of the run."""
    shutil.copytree(a_run, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-000002"


def replace(folder, name, content):
    """Put other bytes into a checkpoint, with a manifest that fits them."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    files = fingerprints(folder, manifest["files"])
    (folder / MANIFEST).write_text(render({**manifest, "files": files}))


def edited(path, **changes):
    return json.dumps({**json.loads(path.read_text()), **changes}).encode()


def stored_in_a_zip(inner):
    """What torch.save writes, with another pickle inside."""
    content = io.BytesIO()
    torch.save(torch.zeros(3), content)
    out = io.BytesIO()
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, inner if entry.endswith("data.pkl") else old.read(entry))
    return out.getvalue()


def with_entry(folder, mark):
    """The real metadata, one tensor of it declared to be any object, for which PyTorch would unpickle."""
    metadata = pickle.loads((folder / "optimizer" / ".metadata").read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    return pickle.dumps(metadata)


def elsewhere(folder, mark):
    metadata = pickle.loads((folder / "optimizer" / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../../../secret"
    return pickle.dumps(metadata)


def bomb(folder, mark):
    return pickle.dumps(Bomb(mark))


def built(module, name, state):
    """Opcodes that set `state` on what a pickle may name, and take it off the stack."""
    one = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    return one + pickle.dumps(state, 2)[2:-1] + b"b0"


def with_a_class_rebuilt(folder, mark):
    """The real metadata, behind opcodes that replace a method of Path for the whole process."""
    real = (folder / "optimizer" / ".metadata").read_bytes()
    return real[:2] + built("pathlib", "Path", (None, {"is_symlink": torch.Size})) + real[2:]


def nested(folder, mark):
    return json.dumps({"state": {}}).encode()[:-1] + b', "x": ' + DEEP.encode() + b"}"


def weights(folder, mark):
    tensors = {name: value + 0 for name, value in load_file(folder / MODEL).items()}
    tensors.popitem()
    return save(tensors)


def with_skipped(folder, count):
    log = json.loads((folder / "state.json").read_text())["log"]
    return edited(folder / "state.json", log={**log, "skipped": count})


def put(document, where, value):
    """A copy of `document` with the value at a path of keys."""
    if not where:
        return value
    return {**document, where[0]: put(document.get(where[0], {}), where[1:], value)}


TEXT = ("data", "position", "streams", "0", "position")
#: Positions and counters out of range, and the field that the refusal has to name. A position that only the
#: text shows to be wrong is named by what it counts.
OUT_OF_RANGE = [
    ("rank-00000.json", (*TEXT, "offset"), -5, "position.offset: "),
    ("rank-00000.json", (*TEXT, "offset"), 10**9, "offset 1000000000 in a document of"),
    ("rank-00000.json", (*TEXT, "epochs"), ["a", "b"], "epochs.0: "),
    ("rank-00000.json", (*TEXT, "epochs"), [5, 4], "epochs [5, 4]"),
    ("rank-00000.json", (*TEXT, "document", "epoch"), -7, "document.epoch: "),
    ("rank-00000.json", (*TEXT, "document", "shard"), 99, "shard 99 of"),
    ("rank-00000.json", (*TEXT, "document", "shard"), 1.5, "document.shard: "),
    ("rank-00000.json", (*TEXT, "document", "record"), -3, "document.record: "),
    ("rank-00000.json", (*TEXT, "document", "record"), 77, "record 77 in a shard of"),
    ("rank-00000.json", (*TEXT, "document", "passed"), "x", "document.passed: "),
    ("rank-00000.json", (*TEXT, "document", "tally", "documents"), 10**400, "tally.documents: "),
    ("rank-00000.json", (*TEXT[:3], "0", "files", "epochs"), [[0, 99]], "epochs [[0, 99]]"),
    ("rank-00000.json", (*TEXT[:3], "0", "rows"), 1, "position.streams.0.rows: "),
    ("rank-00000.json", ("data", "position", "row"), -1, "position.row: "),
    ("rank-00000.json", ("data", "position", "row"), 10**30, "position.row: "),
    ("rank-00000.json", ("data", "position", "row"), 10**15, "rows are of it"),
    ("rank-00000.json", ("data", "fingerprint", "streams"), 2**30, "some are missing"),
    ("state.json", ("tokens",), -1, "tokens: "),
    ("state.json", ("tokens",), True, "tokens: "),
    ("state.json", ("skips",), -(10**30), "skips: "),
    ("state.json", ("schedule_steps",), 0, "schedule_steps: "),
    ("state.json", ("evaluation_due",), "x", "evaluation_due: "),
    ("state.json", ("wandb",), 5, "wandb: "),
    ("state.json", ("products",), 5, "products: "),
    ("state.json", ("products",), {"a": 1}, "products: "),
    ("state.json", ("log", "skipped"), 10**400, "log.skipped: "),
    ("state.json", ("log", "alarmed"), 3, "log.alarmed: "),
]


@pytest.mark.parametrize(
    ("name", "where", "value", "said"),
    OUT_OF_RANGE,
    ids=[f"{name} {where[-1]} {index}" for index, (name, where, *_) in enumerate(OUT_OF_RANGE)],
)
def test_a_position_or_a_counter_out_of_range_is_named(copied, name, where, value, said):
    """Read as a run does that goes on, without the model."""
    content = json.loads((copied / name).read_text())
    content = put(content, ("state", *where) if name.startswith("rank") else where, value)
    replace(copied, name, json.dumps(content).encode())
    start = checkpoint.load(copied)
    recipe = parse_recipe(start.recipe_text, "recipe.toml")
    with pytest.raises(CheckpointError) as caught:
        go_on(start, recipe)
    message = str(caught.value)
    assert message.startswith(f"{copied / name}")
    assert said in message
    assert "\n" not in message
    assert len(message) < 450


def go_on(start, recipe):
    saved_state(start)
    position = saved_position(start)
    tokenizer = tokenizer_of_run(recipe, start)
    with open_rows(recipe.data, tokenizer, batch_size=4, vocab_size=300, streams=1) as rows:
        with position_of(start), contents_of(start.folder / "rank-00000.json"):
            rows.load_state_dict(position)
        with position_of(start):
            rows.start()


def test_what_was_written_is_in_range(copied):
    start = checkpoint.load(copied)
    go_on(start, parse_recipe(start.recipe_text, "recipe.toml"))


def huge_header(folder, mark):
    return struct.pack("<Q", 2**62) + b"{}"


#: For each file of a checkpoint: what it could hold, and a part of the message.
HOSTILE = {
    ("optimizer/.metadata", "code"): (bomb, "has no business there"),
    ("optimizer/.metadata", "any object"): (with_entry, "BytesStorageMetadata has no business there"),
    ("optimizer/.metadata", "a class rebuilt"): (with_a_class_rebuilt, "is no record"),
    ("optimizer/.metadata", "another folder"): (elsewhere, "is no file of this folder"),
    ("optimizer/.metadata", "no pickle"): (lambda f, m: b"\x00" * 40, "does not hold"),
    ("optimizer/.metadata", "another record"): (
        lambda f, m: pickle.dumps(torch.Size([1])),
        "expected Metadata",
    ),
    ("optimizer/__0_0.distcp", "code"): (lambda f, m: stored_in_a_zip(bomb(f, m)) * 40, ""),
    ("optimizer/__0_0.distcp", "nothing"): (lambda f, m: b"", ""),
    ("state.json", "a count that is none"): (lambda f, m: with_skipped(f, ""), "state.json"),
    ("state.json", "nothing for a count"): (lambda f, m: with_skipped(f, None), "state.json"),
    ("optimizer.json", "deep"): (nested, "optimizer.json"),
    ("optimizer.json", "a list"): (lambda f, m: b"[]", "expected an object, found a list"),
    ("optimizer.json", "without groups"): (lambda f, m: b'{"class": "AdamW"}', "KeyError"),
    ("optimizer.json", "no numbers"): (
        lambda f, m: edited(f / "optimizer.json", state={"model.norm.weight": {"exp_avg": {"shape": ["x"]}}}),
        "optimizer.json",
    ),
    ("rank-00000.json", "a number"): (lambda f, m: b"1", "expected an object, found a int"),
    ("rank-00000.json", "random"): (lambda f, m: edited(f / "rank-00000.json", random={}), "KeyError"),
    ("rank-00000.json", "position"): (
        lambda f, m: edited(f / "rank-00000.json", state={"data": []}),
        "rank-00000.json",
    ),
    ("state.json", "deep"): (nested, "state.json"),
    ("state.json", "no JSON"): (lambda f, m: b"{", "state.json"),
    ("state.json", "tokens"): (lambda f, m: edited(f / "state.json", tokens="many"), "state.json"),
    ("state.json", "log"): (
        lambda f, m: edited(
            f / "state.json", log={"histories": {"sparsity_relu/*": {"columns": [[1], [1, 2]]}}}
        ),
        "of different lengths",
    ),
    ("plan.json", "no text"): (lambda f, m: b"\xff\xfe\x00", "plan.json"),
    ("recipe.toml", "no TOML"): (lambda f, m: b"]", "recipe.toml: not valid TOML"),
    ("recipe.toml", "deep"): (lambda f, m: b"x = " + DEEP.encode(), "recipe.toml"),
    ("recipe.toml", "no text"): (lambda f, m: b"\xff\xff", "recipe.toml"),
    ("recipe.toml", "another one's file"): (lambda f, m: b'extends = "/etc/passwd.toml"', "does not exist"),
    ("tokenizer.json", "no JSON"): (lambda f, m: b"{]", "tokenizer.json"),
    ("tokenizer.json", "empty"): (lambda f, m: b"{}", "tokenizer.json"),
    (MODEL, "a pickle"): (bomb, "model.safetensors is no safetensors file"),
    (MODEL, "a header of exabytes"): (huge_header, "model.safetensors is no safetensors file"),
    (MODEL, "one tensor less"): (weights, "is absent in the checkpoint"),
}


@pytest.mark.parametrize(("name", "kind"), HOSTILE.keys(), ids=[" ".join(key) for key in HOSTILE])
def test_a_hostile_file_runs_nothing_and_is_named(tiny, copied, tmp_path, name, kind):
    make, message = HOSTILE[name, kind]
    mark = tmp_path / "executed"
    replace(copied, name, make(copied, mark))
    checkpoint_files = sorted(copied.parent.iterdir())
    with pytest.raises(Act24Error) as caught:
        train(tiny(*OVERRIDES), tmp_path / "other", resume=str(copied))
    assert not mark.exists()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()
    assert sorted(copied.parent.iterdir()) == checkpoint_files
    if name in checkpoint.MODEL_FILES and name != "state.json":
        with pytest.raises(Act24Error):
            evaluate_checkpoint(copied)


@pytest.mark.parametrize("state", [(None, {"mark": 1}), {"mark": 1}, [1]], ids=["slots", "a dict", "a list"])
def test_nothing_that_a_pickle_may_name_is_altered_by_it(state):
    """pathlib.Path.is_symlink was torch.Size for the whole process, and the run went on."""
    named = [(module, name) for module, names in reading._RECORDS.items() for name in sorted(names)]
    for module, name in [*named, ("torch", "float32")]:
        try:
            one = pkgutil.resolve_name(f"{module}:{name}")
        except ImportError:  # a module of another Python
            continue
        before = dict(vars(one)) if hasattr(one, "__dict__") else {}
        with pytest.raises(pickle.UnpicklingError, match="is no record"):
            reading._RecordUnpickler(io.BytesIO(b"\x80\x02" + built(module, name, state) + b"N.")).load()
        assert (dict(vars(one)) if hasattr(one, "__dict__") else {}) == before


@pytest.mark.parametrize("state", [{"__class__": 1}, {"keys": 1}, (None, {"fqn": 1}), [1], 5, None])
def test_a_record_has_its_own_fields_and_no_others(state):
    record = pickle.dumps(MetadataIndex("weight"), 2)
    refused = pickle.UnpicklingError, AttributeError
    with pytest.raises(refused):
        reading._RecordUnpickler(io.BytesIO(record[:-1] + pickle.dumps(state, 2)[2:-1] + b"b.")).load()


def test_every_record_of_a_checkpoint_is_read_as_pickle_reads_it(a_run):
    content = (a_run / "checkpoints" / "step-000002" / "optimizer" / ".metadata").read_bytes()
    read = reading._RecordUnpickler(io.BytesIO(content)).load()
    assert len(read.state_dict_metadata) > 10
    assert read == pickle.loads(content)


MANIFESTS = {
    "no counter": {"step": "two"},
    "a negative step": {"step": -1},
    "no files": {"files": None},
    "no sizes": {"files": {"state.json": {"sha256": ""}}},
    "files elsewhere": {"files": {"../../secret": {"bytes": 1, "sha256": ""}}},
    "an absolute path": {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
    "no weights": {"files": {}},
    "another sequence": {"sequence": [1]},
}


@pytest.mark.parametrize("changes", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_hostile_manifest_is_refused(copied, changes):
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(render({**manifest, **changes}))
    with pytest.raises(CheckpointError, match=r"manifest|is no checkpoint of a run"):
        load(copied)


def test_every_file_of_a_checkpoint_has_a_hostile_one(a_run):
    folder = a_run / "checkpoints" / "step-000002"
    assert {name for name, _ in HOSTILE} == set(contents(folder))


def test_the_untouched_copy_goes_on(tiny, copied, tmp_path):
    """So that none of the refusals above is one of the copy."""
    name = "state.json"
    replace(copied, name, (copied / name).read_bytes())
    assert train(tiny(*OVERRIDES), tmp_path / "other", resume=str(copied)).step == 4
