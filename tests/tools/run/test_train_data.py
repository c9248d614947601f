"""What a run says of its text: epochs, files that were added, a measure out of reach."""

import json
import re
import shutil

import pytest
from slow import slow_after, slow_but
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import text, write_recipe

from act24.errors import Act24Error
from act24.recipes.load import load_recipe
from act24.recipes.schema import Data, Tokenizer
from act24.tools.data import open_tokenizer, prepare_shards, rows
from act24.tools.run.build import load
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.train import TrainingRun, train


@pytest.fixture
def own(tmp_path, tiny_file):
    """The tiny recipe with text of its own, which a test may change; the tokenizer's cache is shared."""
    return write_recipe(tmp_path)


def scalars(run_dir, tag):
    log = EventAccumulator(str(run_dir))
    log.Reload()
    return {event.step: event.value for event in log.Scalars(tag)}


def test_epochs_are_said_and_drawn(own, tiny, tmp_path, capsys):
    (tmp_path / "train-1.txt").unlink()
    (tmp_path / "train-2.txt").unlink()
    (tmp_path / "train-3.txt").unlink()
    (tmp_path / "train-0.txt").write_text(text(150, 0))
    recipe = load_recipe(str(own), ["train.steps=9", "eval.tokens=100000"])
    train(recipe, tmp_path / "run")
    out = capsys.readouterr().out
    drawn = scalars(tmp_path / "run", "text/epoch")
    assert list(drawn) == list(range(1, 10))  # the first epoch is one too
    assert drawn[1] == 0
    assert max(drawn.values()) >= 2
    begins = {int(value): step for step, value in reversed(drawn.items()) if value}
    for epoch, step in begins.items():
        assert f"step {step}: epoch {epoch} of the training text begins (the first was 0)\n" in out
    assert out.count("of the training text begins") == len(begins)
    assert "warning: the held-out text has " in out
    assert "fewer than eval.tokens = 100,000" in out


@pytest.mark.parametrize("files", slow_but((4,), [1, 4]))
def test_an_epoch_is_said_at_the_step_that_begins_it(own, tmp_path, capsys, files):
    """By the number of tokens: 8 rows of 16 a step."""
    for index in range(4):
        (tmp_path / f"train-{index}.txt").write_text(text(400, index))
        if index >= files:
            (tmp_path / f"train-{index}.txt").unlink()
    recipe = load_recipe(str(own), ["train.steps=40", "eval.every=0"])
    tokenizer = open_tokenizer(recipe.data, recipe.tokenizer)
    tokens = sum(len(tokenizer.encode(file.read_text())) + 1 for file in tmp_path.glob("train-*.txt"))
    train(recipe, tmp_path / "run")
    expected = {e: e * tokens // 128 + 1 for e in range(1, 40 * 128 // tokens + 1)}
    said = re.findall(r"step (\d+): epoch (\d+) of the training text begins", capsys.readouterr().out)
    assert {int(epoch): int(step) for step, epoch in said} == expected
    drawn = scalars(tmp_path / "run", "text/epoch")
    assert {epoch: min(step for step in drawn if drawn[step] == epoch) for epoch in expected} == expected


def test_text_that_is_edited_in_a_run_ends_it_and_its_checkpoint_goes_on(own, tmp_path, monkeypatch):
    """At the first step of the second epoch all files get another text, which is then put back."""
    monkeypatch.setattr(rows, "GROUP_DOCUMENTS", 1)  # 64 would be 16 epochs of this text, read ahead
    files = sorted(tmp_path.glob("train-*.txt"))
    for index, file in enumerate(files):
        file.write_text(text(400, index))
    recipe = load_recipe(str(own), ["train.steps=36", "eval.every=0"])
    straight = train(recipe, tmp_path / "straight")
    advance = TrainingRun.advance

    def edited(self):
        advance(self)
        if self._rows.epoch == 1:
            for index, file in enumerate(files):
                file.write_text(text(400, 500 + index))

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "advance", edited)
        with pytest.raises(Act24Error, match=r"was changed while it is read, .*; saved step \d+ in "):
            train(recipe, tmp_path / "run")
    with pytest.raises(Act24Error, match=r"4 of 4 files are gone .*put back what was there and go on, or"):
        train(recipe, tmp_path / "run", resume="auto")
    for index, file in enumerate(files):
        file.write_text(text(400, index))
    assert train(recipe, tmp_path / "run", resume="auto").evaluation == straight.evaluation


def test_data_grow(own, act24, tmp_path, capsys):
    arguments = ("train", own, "--run-dir", tmp_path / "run", "--set", "checkpoint.every=2")
    arguments += ("--set", "train.steps=5")
    assert act24(*arguments)[0] == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step-000005")
    files = len(list(tmp_path.glob("train-*.txt")))
    (tmp_path / "train-9.txt").write_text(text(100, 99))
    status, _, (line,) = act24(*arguments, "--resume", "auto")
    assert status == 2
    assert "1 file was added" in line
    assert line.endswith("from the next epoch on")
    status, out, errors = act24(*arguments, "--resume", "auto", "--data", "grow")
    assert (status, errors) == (0, [])
    assert "train-9.txt): read from epoch 1 on" in out
    changes = [json.loads(line).get("changes") for line in (tmp_path / "run/history.jsonl").open()]
    assert changes == [None, {"files": [files, files + 1]}]


def test_grow_leaves_an_epoch_that_was_begun_as_it_was(own, act24, tmp_path):
    """The checkpoint lies in the first document of epoch 1."""
    for index in range(4):
        (tmp_path / f"train-{index}.txt").write_text(text(400, index))
    arguments = (
        "train",
        own,
        "--set",
        "train.steps=40",
        "--set",
        "checkpoint.every=16",
        "--set",
        "eval.every=0",
    )
    status, out, _ = act24(*arguments, "--run-dir", tmp_path / "straight", "--set", "checkpoint.keep=9")
    begins = {int(e): int(step) for step, e in re.findall(r"step (\d+): epoch (\d+) of the training", out)}
    assert status == 0
    assert begins[1] in (15, 16)
    shutil.copytree(tmp_path / "straight/checkpoints/step-000016", tmp_path / "step-000016")
    for index in range(3):
        (tmp_path / f"train-9{index}.txt").write_text("zebra quilt jigsaw oxen " * 500)
    grown = ("--resume", tmp_path / "step-000016", "--data", "grow", "--run-dir", tmp_path / "grown")
    status, out, errors = act24(*arguments, *grown)
    assert (status, errors) == (0, [])
    assert "3 files were added" in out
    assert "read from epoch 2 on" in out
    before, after = (scalars(tmp_path / name, "loss/train") for name in ("straight", "grown"))
    assert all(after[step] == before[step] for step in range(17, begins[2]))
    assert after[40] != before[40]  # epoch 2 reads what was added


def moved_recipe(kind, folder, name):
    """A recipe whose data, or tokenizer, lie in `folder`, by absolute path."""
    files = write_recipe(folder)
    recipe = files.parent / name
    if kind == "files":
        files.rename(recipe)
    elif kind == "shards":
        data = load_recipe(str(files), []).data
        prepare_shards(data, open_tokenizer(data, Tokenizer(vocab_size=300)), folder / "shards")
        source = f'source = "shards"\nshards = "{folder}/shards"\nmax_length'
        recipe.write_text(re.sub(r'(?s)source = "files".*?max_length', source, files.read_text()))
    else:
        path = folder / "tokenizer.json"
        data = load_recipe(str(files), []).data
        path.write_text(open_tokenizer(data, Tokenizer(vocab_size=300)).to_json())
        recipe.write_text(files.read_text().replace("[tokenizer]", f'[tokenizer]\nname = "{path}"'))
    return recipe


CHANGED = {  # the file that is altered after the move, how, and what is said then
    "files": ("heldout.txt", "low", "LOW", "the content of data.heldout_files is another"),
    "shards": ("train-0.txt", "low", "LOW", "index was '[0-9a-f]+' and is '[0-9a-f]+'$"),
    "tokenizer": ("tokenizer.json", "256", "257", "tokenizer.name was .* which is another tokenizer$"),
}


@pytest.mark.parametrize("kind", slow_after(1, CHANGED))
def test_data_that_moved_as_a_whole_go_on(tiny_file, act24, tmp_path, kind):
    """The recipe names the new folder. The same content elsewhere is the same data; another is refused."""
    there = tmp_path / "there"
    there.mkdir()
    recipe = moved_recipe(kind, there, "recipe.toml")
    arguments = ("--set", "train.steps=6", "--set", "checkpoint.every=4", "--set", "eval.every=0")
    assert act24("train", recipe, "--run-dir", tmp_path / "straight", *arguments)[0] == 0
    start = shutil.copytree(tmp_path / "straight/checkpoints/step-000004", tmp_path / "step-000004")
    here = tmp_path / "here"
    there.rename(here)
    recipe = here / "recipe.toml"
    files = Data(source="files", train_files=(f"{here}/train-*.txt",), heldout_files=(f"{here}/heldout.txt",))
    recipe.write_text(recipe.read_text().replace(str(there), str(here)))
    go_on = ("train", recipe, *arguments, "--resume", start, "--run-dir")
    status, out, errors = act24(*go_on, tmp_path / "moved")
    assert (status, errors) == (0, [])
    assert re.search(rf"from step 4 on: \S+ was .*{there}.* and is .*{here}.*: it is compared by", out)
    straight, moved = (scalars(tmp_path / run, "loss/train") for run in ("straight", "moved"))
    assert moved == {step: straight[step] for step in (5, 6)}

    name, old, new, message = CHANGED[kind]
    (here / name).write_text((here / name).read_text().replace(old, new, 1))
    if kind == "shards":
        shutil.rmtree(here / "shards")
        tokenizer = open_tokenizer(files, Tokenizer(name=str(start / "tokenizer.json")))
        prepare_shards(files, tokenizer, here / "shards")
    status, _, (error,) = act24(*go_on, tmp_path / "changed")
    assert status == 2
    assert re.search(message, error)
    assert not (tmp_path / "changed/checkpoints").exists()


def test_eval_says_what_it_could_not_reach(own, tmp_path, caplog):
    train(load_recipe(str(own), ["train.steps=5"]), tmp_path / "run")
    evaluate_checkpoint(tmp_path / "run", ["eval.tokens=100000"])
    assert "the held-out text has " in caplog.text
    (tmp_path / "heldout.txt").unlink()
    with pytest.raises(Act24Error, match="no data file matches"):
        evaluate_checkpoint(tmp_path / "run")


def held_out_by_name(folder):
    (folder / "heldout.txt").write_text(text(600, 10))


def held_out_by_content(folder):
    (folder / "train-1.txt").write_text(text(2000, 77))
    (folder / "train-9.txt").write_text(text(2000, 78))


OTHER_TEXT = {
    "held-out files": ([], held_out_by_name, "the content of data.heldout_files is another"),
    "files of which a part is held out": (
        ["data.heldout_files=[]"],
        held_out_by_content,
        "2 of the files of which a part is held out are others",
    ),
}


@pytest.mark.parametrize("what", slow_after(1, OTHER_TEXT))
def test_eval_says_that_the_held_out_text_is_another(own, tmp_path, caplog, monkeypatch, what):
    """It gave another loss without a word, also where some of the text had been trained on."""
    overrides, edit, said = OTHER_TEXT[what]
    train(load_recipe(str(own), ["train.steps=5", *overrides]), tmp_path / "run")

    def warned(*more):
        caplog.clear()
        evaluate_checkpoint(tmp_path / "run", ["eval.tokens=50", *more])
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert warned() == []
    edit(tmp_path)
    (line,) = warned()
    assert line.startswith(f"warning: the held-out text is not that of the run: {said}. The loss cannot")
    (tmp_path / "other.txt").write_text(text(600, 11))  # who names other text knows
    assert warned(f'data.heldout_files=["{tmp_path}/other.txt"]') == []

    def load_and_lose(*arguments):
        built = load(*arguments)
        shutil.rmtree(tmp_path / "run/checkpoints")  # as the run that goes on may
        return built

    monkeypatch.setattr("act24.tools.run.evaluate.load", load_and_lose)
    (line,) = warned()
    assert line.startswith("warning: whether the held-out text is still that of the run is not known: ")


def test_a_data_error_ends_a_run_with_a_checkpoint(own, act24, tmp_path, monkeypatch):
    """A file that cannot be read any more, met in the middle of training; resumed once it can."""
    from act24.tools.data import documents

    overrides = ("train.steps=100", "eval.every=0", "log.every=9")  # the last window is of step 100
    whole = train(load_recipe(str(own), overrides), tmp_path / "whole")
    read, reads = documents.read_documents, []

    def failing(path, how, wanted):
        reads.append(path)
        if len(reads) > 4 + 1 + 2:  # for the tokenizer, to evaluate, to train
            raise Act24Error("cannot read the file: Input/output error")
        yield from read(path, how, wanted)

    monkeypatch.setattr(documents, "read_documents", failing)
    monkeypatch.setattr("act24.tools.data.rows.GROUP_DOCUMENTS", 1)  # or all four are read at once
    arguments = (
        "train",
        own,
        "--run-dir",
        tmp_path / "run",
        *(word for override in overrides for word in ("--set", override)),
    )
    status, _, errors = act24(*arguments)
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    told = f"act24: cannot read the file: Input/output error; saved step {int(saved.name[5:])} in {saved}"
    assert (status, errors) == (2, [told])
    step = int(saved.name.removeprefix("step-"))
    assert 0 < step < 100

    monkeypatch.setattr(documents, "read_documents", read)
    status, _, errors = act24(*arguments, "--resume", "auto")
    assert (status, errors) == (0, [])
    assert scalars(tmp_path / "run", "loss/train")[100] == pytest.approx(whole.loss, abs=1e-6)


def test_a_run_stays_at_the_commit_that_it_began_with(own, tiny, tmp_path, monkeypatch):
    import datasets

    from act24.recipes.load import parse_recipe
    from act24.tools.data import hub

    texts = {"train": text(400, 1), "validation": text(200, 2)}
    for name, content in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{content} {i}"}}\n' for i in range(40)))
    opened, newest = [], ["a" * 40]

    def load_stream(dataset, subset, split, revision):
        opened.append(revision)
        files = str(tmp_path / f"{split}.jsonl")
        return datasets.load_dataset("json", data_files={split: files}, split=split, streaming=True)

    monkeypatch.setattr(hub, "load_stream", load_stream)
    monkeypatch.setattr(hub, "find_commit", lambda dataset: newest[-1])
    overrides = ["train.steps=6", "checkpoint.every=5", "data.source=hf", "data.dataset=owner/name"]
    recipe = load_recipe(str(own), overrides)
    train(recipe, tmp_path / "run")
    saved = tmp_path / "run/checkpoints/step-000005"
    assert parse_recipe((saved / "recipe.toml").read_text(), "saved").data.revision == "a" * 40
    newest.append("b" * 40)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")
    train(recipe, tmp_path / "run", resume="auto")
    evaluate_checkpoint(tmp_path / "run")
    assert set(opened) <= {"a" * 40, None}
    assert opened.count(None) <= 1, "the tokenizer is trained before"
    with pytest.raises(Act24Error, match=r"data\.revision was 'a+' and is 'c+'"):
        train(
            load_recipe(str(own), [*overrides, f"data.revision={'c' * 40}"]), tmp_path / "run", resume="auto"
        )
