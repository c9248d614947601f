"""The same data are the same content: what a saved position finds again, and what it notices."""

import json
import os
import shutil
from collections import Counter

import pytest
from slow import slow_but

from act24.errors import Act24Error
from act24.recipes.schema import Data, Tokenizer
from act24.tools.data import heldout_rows, identity, open_documents, open_rows, open_tokenizer, prepare_shards
from act24.tools.data.documents import FRUITLESS, Documents, other_heldout_text
from act24.tools.data.files import find_files
from act24.tools.data.shards import TokenShards


def write(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def section(folder, **keys):
    return Data(
        source="files",
        train_files=(f"{folder}/train*.txt",),
        heldout_files=(f"{folder}/held.txt",),
        rows="padded",
        max_length=32,
        **keys,
    )


TEXTS = {f"train{i}.txt": f"low rank {i} two of four" for i in range(6)} | {"held.txt": "sparse graph"}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data", TEXTS)
    return tmp_path / "data"


@pytest.fixture
def opened(tokenizer):
    """Rows one by one, as text; and the state after so many."""

    def rows(data, count, state=None, grow=False, **place):
        with open_rows(data, tokenizer, batch_size=1, vocab_size=300, **place) as batches:
            if state is not None:
                batches.load_state_dict(json.loads(json.dumps(state)), grow)
            texts = [tokenizer.decode(next(batches).input_ids[0].tolist()) for _ in range(count)]
            return texts, batches.state_dict(), batches.warnings

    return rows


# ------------------------------------------------------------------------------------------------ one file


def test_two_spellings_of_one_file_are_one_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    os.symlink("train0.txt", "another.txt")
    patterns = ("train*.txt", f"{folder}/train*.txt", "../data/train0.txt", "another.txt")
    assert sorted(path.resolve().name for path in find_files(patterns)) == sorted(TEXTS)[1:]


@pytest.mark.parametrize("spelling", ["relative", "absolute", "link", "hard link"])
def test_what_is_held_out_is_not_trained_on_however_it_is_spelled(folder, monkeypatch, spelling):
    monkeypatch.chdir(folder.parent)
    os.symlink(folder, "elsewhere")
    os.link(folder / "train0.txt", "linked.txt")
    heldout = {
        "relative": "data/train0.txt",
        "absolute": f"{folder}/train0.txt",
        "link": "elsewhere/train0.txt",
        "hard link": "linked.txt",
    }
    data = section("data").model_copy(update={"heldout_files": (heldout[spelling],)})
    assert sorted(open_documents(data, "train")) == sorted(TEXTS[f"train{i}.txt"] for i in range(1, 6))
    assert list(open_documents(data, "heldout")) == [TEXTS["train0.txt"]]
    everything = data.model_copy(update={"heldout_files": (f"{folder}/train*.txt",)})
    with pytest.raises(Act24Error, match=r"every file of data\.train_files is also in data\.heldout_files"):
        open_documents(everything, "train")


def test_a_copy_of_what_is_held_out_is_said(folder):
    assert open_documents(section(folder), "train").tally.lines() == []
    shutil.copy(folder / "held.txt", folder / "train9.txt")
    (line,) = open_documents(section(folder), "train").tally.lines()
    assert line == (
        "1 file of data.train_files has the content of one in data.heldout_files, and is trained on: "
        f"{folder}/train9.txt"
    )


# ------------------------------------------------------------------------------------- the same, or not


def test_a_folder_that_moved_as_a_whole_is_the_same(folder, opened, tmp_path):
    straight, _, _ = opened(section(folder), 15)
    first, state, _ = opened(section(folder), 4)
    shutil.move(folder, tmp_path / "there")
    second, _, warnings = opened(section(tmp_path / "there"), 11, state)
    assert (first + second, warnings) == (straight, [])


def test_files_that_were_renamed_keep_the_order_of_the_run(folder, opened):
    straight, _, _ = opened(section(folder), 15)
    first, state, _ = opened(section(folder), 4)
    for index in range(6):  # in the other order from now on
        (folder / f"train{index}.txt").rename(folder / f"train-{9 - index}.txt")
    second, _, _ = opened(section(folder), 11, state)
    assert first + second == straight


CHANGES = {
    "an edit of the same size": ("train3.txt", "LOW rank 3 two of four", "1 of 6 files is gone or its"),
    "the held-out text": ("held.txt", "SPARSE graph", r"the content of data\.heldout_files is another"),
    "a file that is gone": (
        "train3.txt",
        None,
        "1 of 6 files is gone or its content has changed; put back",
    ),
    "a file that was added": (
        "train9.txt",
        "a model",
        r"1 file was added \(.*train9\.txt\); --data grow reads",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_is_noticed(folder, opened, change):
    name, text, message = CHANGES[change]
    _, state, _ = opened(section(folder), 4)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(Act24Error, match=f"the data are not those of the saved position: {message}"):
        opened(section(folder), 1, state)


def test_a_position_of_an_older_act24_is_refused(folder, opened):
    _, state, _ = opened(section(folder), 1)
    state["position"]["streams"]["0"]["files"] = "0123456789abcdef"
    with pytest.raises(Act24Error, match="its list of files is not one that this act24 reads"):
        opened(section(folder), 1, state)
    _, state, _ = opened(section(folder), 1)
    del state["position"]["streams"]["0"]["position"]["epochs"]
    with pytest.raises(Act24Error, match="its position is not one that this act24 reads"):
        opened(section(folder), 1, state)


def test_of_a_large_file_pieces_are_compared_and_another_time_is_said(folder, opened, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 1000)
    monkeypatch.setattr(identity, "PIECE", 10)
    large = folder / "train3.txt"
    large.write_bytes(b"low rank " * 300)
    os.utime(large, (1, 1))
    _, state, _ = opened(section(folder), 1)
    content = bytearray(large.read_bytes())
    content[15] ^= 1  # behind the first piece of ten bytes
    large.write_bytes(content)
    (warning,) = opened(section(folder), 1, state)[2]
    assert warning.startswith(f"1 large file was modified or copied since the checkpoint ({large})")
    content[5] ^= 1
    large.write_bytes(content)
    with pytest.raises(Act24Error, match="1 of 6 files is gone or its content has changed"):
        opened(section(folder), 1, state)


def read_on(folder, edit, count, **keys):
    """Texts of `count` documents after those of the first epoch, where `edit` came between."""
    documents = open_documents(section(folder, **keys), "train", shuffle_seed=0, endless=True)
    first = [next(documents) for _ in range(6)]
    edit()
    return documents, first, [next(documents) for _ in range(count)]


def test_text_that_is_edited_while_it_is_read_is_noticed_before_it_is_used(folder):
    """It was trained on in silence, and the run could not go on with either text."""
    touch = lambda: os.utime(folder / "train3.txt", (1, 1))  # noqa: E731
    documents, first, second = read_on(folder, touch, 6)
    assert sorted(first) == sorted(second)  # the same content at another time is the same
    assert not documents.tally.lines()
    (folder / "train3.txt").write_text("LOW rank 3 two of four")
    seen = []
    with pytest.raises(
        Act24Error, match=r"train3\.txt was changed while it is read, .* put back what was there"
    ):
        seen.extend(iter(documents.__next__, None))
    assert set(seen) <= set(first)


def test_lines_that_change_while_their_file_is_read_are_noticed_at_its_end(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(9)))
    write(tmp_path, {"held.txt": "sparse graph"})
    data = section(tmp_path).model_copy(update={"train_files": (str(path),)})
    documents = open_documents(data, "train", endless=True)
    assert next(documents) == "0"
    path.write_text(path.read_text().replace("8", "9"))
    with pytest.raises(Act24Error, match=r"train\.jsonl was changed while it is read"):
        [next(documents) for _ in range(9)]


def test_a_large_file_that_is_touched_while_it_is_read_is_said(folder, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 10)
    monkeypatch.setattr(identity, "PIECE", 2)
    documents, _, _ = read_on(folder, lambda: os.utime(folder / "train3.txt", (1, 1)), 12)
    (line,) = documents.tally.lines()
    assert line.startswith("1 large file was modified while it is read")
    assert line.endswith(f"not compared: {folder / 'train3.txt'}")


def test_shards_of_other_text_are_other_held_out_text(folder, tokenizer, tmp_path):
    shards = [Data(source="shards", shards=str(tmp_path / name), max_length=8) for name in ("a", "b")]
    prepare_shards(section(folder), tokenizer, tmp_path / "a")
    (folder / "held.txt").write_text("SPARSE graph")
    prepare_shards(section(folder), tokenizer, tmp_path / "b")
    with open_rows(shards[0], tokenizer, batch_size=1, vocab_size=300) as batches:
        saved = batches.state_dict()["fingerprint"]
    assert [other_heldout_text(data, saved) for data in shards] == [
        None,
        "the content of data.shards is another",
    ]


# ---------------------------------------------------------------------------------------------- growing


def test_added_files_are_read_from_the_next_epoch_on(folder, opened):
    old = Counter(TEXTS[f"train{i}.txt"] for i in range(6))
    straight, _, _ = opened(section(folder), 12)
    first, state, _ = opened(section(folder), 8)  # two documents into epoch 1
    write(folder, {"train0a.txt": "a new one", "train99.txt": "another new one"})
    grown, later, (warning,) = opened(section(folder), 4 + 8 + 8, state, grow=True)
    assert warning.startswith("2 files were added (")
    assert warning.endswith("): read from epoch 2 on")
    assert first + grown[:4] == straight, "the epoch at hand is as it would have been"
    both = old + Counter(["a new one", "another new one"])
    assert Counter(grown[4:12]) == Counter(grown[12:]) == both
    assert grown[4:12] != grown[12:]

    _, between, _ = opened(section(folder), 6, state, grow=True)  # saved and resumed once more, now as it is
    again, end, warnings = opened(section(folder), 14, between)
    assert (again, end, warnings) == (grown[6:], later, [])


@pytest.mark.parametrize("buffer", slow_but((4,), [0, 4, 40]))
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_epoch_that_was_begun_stays_as_it_was(folder, opened, tokenizer, layout, buffer):
    """Grown after any number of rows, inside the first document of an epoch or a buffer as well: all text of
    the epochs that were begun is as without the growth, and then comes each file once an epoch."""
    keys = {"rows": layout, "max_length": 32 if layout == "padded" else 7, "shuffle_buffer": buffer}
    data = section(folder).model_copy(update=keys)
    old = [TEXTS[f"train{i}.txt"] for i in range(6)]
    size = {text: len(tokenizer.encode(text)) + 1 if layout == "packed" else 1 for text in old}
    epoch_rows = sum(size.values()) / (7 if layout == "packed" else 1)
    straight, _, _ = opened(data, 60)
    states = []
    for rows in range(1, 32):
        _, state, _ = opened(data, rows)
        states.append(state)
        assert state["epoch"] == -(-rows // epoch_rows) - 1, "the epoch of the last token"
    new = {"train0a.txt": "a new one", "train99.txt": "another new one"}
    write(folder, new)
    for rows, state in enumerate(states, 1):
        texts, _, (warning,) = opened(data, 60 - rows, state, grow=True)
        first = int(warning.rpartition("epoch ")[2].removesuffix(" on"))
        assert first == state["epoch"] + 1 or buffer
        ends = min(int(first * epoch_rows), 60)  # whole rows of text that was not there to be drawn
        if buffer:  # one that reaches into the first grown epoch is mixed otherwise
            ends = max(int(min(first * 6 // buffer * buffer, 60) * epoch_rows / 6) - 1, rows)
        assert texts[: ends - rows] == straight[rows:ends]
        if layout == "padded" and not buffer:
            assert Counter(texts[ends - rows : ends - rows + 8]) == Counter([*old, *new.values()])


@pytest.mark.parametrize("grow", [False, True])
def test_text_that_was_split_by_position_does_not_grow(tmp_path, opened, grow):
    """One text, its end held out; with forty more, whole documents would be. The way out is named."""
    write(tmp_path, {"train.txt": "low rank two of four tokens\n" * 40})
    data = section(tmp_path).model_copy(update={"heldout_files": ()})
    _, state, _ = opened(data, 1)
    write(tmp_path, {f"train{i}.txt": f"sparse graph {i}" for i in range(40)})
    with pytest.raises(Act24Error, match="it held out the end of each document") as caught:
        opened(data, 1, state, grow=grow)
    assert "would hold out whole documents now" in str(caught.value)
    assert str(caught.value).endswith("or begin another run with model.pretrained = the checkpoint")
    for i in range(40):
        (tmp_path / f"train{i}.txt").unlink()
    opened(data, 1, state)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_what_was_added(folder, opened, world_size):
    ranks = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    states = [opened(section(folder), 6 // world_size, **place)[1] for place in ranks]
    write(folder, {f"train-{i}.txt": f"new {i}" for i in range(6)})
    seen = Counter()
    for place, state in zip(ranks, states, strict=True):
        seen.update(opened(section(folder), 12 // world_size, state, grow=True, **place)[0])
    assert sum(seen.values()) == 12
    assert seen == Counter([*(TEXTS[f"train{i}.txt"] for i in range(6)), *(f"new {i}" for i in range(6))])


def test_only_files_grow(folder, opened, tokenizer, tmp_path):
    prepare_shards(section(folder), tokenizer, tmp_path / "shards")
    data = Data(source="shards", shards=str(tmp_path / "shards"), max_length=8)
    _, state, _ = opened(data, 1)
    with pytest.raises(Act24Error, match=r'--data grow is for data\.source = "files"'):
        opened(data, 1, state, grow=True)


# ---------------------------------------------------------------------------- a rank that comes away empty


def test_a_rank_without_a_document_in_one_epoch_goes_on():
    """Three shards, two of them empty, for three ranks: each rank meets the full one in some epoch."""
    shards = [lambda wanted: iter(["text"]), lambda wanted: iter([""]), lambda wanted: iter([None])]
    epochs = set()
    for rank in range(3):
        documents = Documents(shards, {}, shuffle_seed=0, endless=True, rank=rank, world_size=3)
        for _ in range(5):
            assert next(documents) == "text"
            epochs.add(documents.state_dict()["epoch"])
    assert max(epochs) > 5, "or nothing was tried"


def test_a_rank_that_never_finds_a_document_says_so():
    read = []

    def one(wanted):
        read.append(None)
        return iter(["text" if wanted(0) else None])

    assert next(Documents([one], {}, endless=True, rank=0, world_size=2)) == "text"
    with pytest.raises(Act24Error, match="none here"):
        next(Documents([one], {}, endless=True, rank=1, world_size=2, empty="none here"))
    assert len(read) < 3 * FRUITLESS
    read.clear()
    with pytest.raises(Act24Error, match="none here"):  # for nobody: said in the first epoch
        next(
            Documents(
                [lambda wanted: iter([""])] * 2, {}, endless=True, rank=0, world_size=2, empty="none here"
            )
        )


# ------------------------------------------------------------------------------------------ token shards


def altered(index, change):
    """The index with one thing changed."""
    splits = index["splits"]
    if change == "another dtype":
        index["dtype"] = "<u4"
    elif change == "no dtype at all":
        index["dtype"] = "<f2"
    elif change == "swapped splits":
        splits["train"], splits["heldout"] = splits["heldout"], splits["train"]
    elif change == "no held-out split":
        del splits["heldout"]
    elif change == "fewer tokens":
        splits["train"]["tokens"] -= 1
    elif change == "more documents":
        splits["train"]["documents"] += 1
    elif change == "another end of text":
        index["tokenizer"]["eos_id"] += 1
    elif change == "a file of text":
        splits["train"]["shards"] = "train-00000.bin"
    return index


@pytest.mark.parametrize(
    "change",
    [
        "another dtype",
        "no dtype at all",
        "swapped splits",
        "no held-out split",
        "fewer tokens",
        "more documents",
        "another end of text",
        "a file of text",
    ],
)
def test_an_index_that_was_altered_is_noticed(folder, tokenizer, tmp_path, change):

    out = tmp_path / "shards"
    prepare_shards(section(folder), tokenizer, out)
    shards = Data(source="shards", shards=str(out))
    index = altered(json.loads((out / "index.json").read_text()), change)
    (out / "index.json").write_text(json.dumps(index))
    of_tokenizer = change == "another end of text"
    with pytest.raises(Act24Error, match=r"index\.json was altered: "):
        _ = open_tokenizer(shards, Tokenizer()) if of_tokenizer else TokenShards(out, "train")


# ------------------------------------------------------------------------------------------- the measure


def test_a_measure_that_is_out_of_reach_is_said(folder, tokenizer):
    rows = heldout_rows(section(folder), tokenizer, 1000, vocab_size=300)
    (warning,) = rows.warnings
    assert warning.startswith(
        f"the held-out text has {rows.tokens} predicted tokens, fewer than eval.tokens = 1,000"
    )
    assert heldout_rows(section(folder), tokenizer, rows.tokens, vocab_size=300).warnings == ()
