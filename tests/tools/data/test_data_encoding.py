"""Text as it comes: encodings, compressions, little of it, and what is counted."""

import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data import heldout_rows, open_documents, open_rows
from act24.tools.data.files import Reading, read_documents
from act24.tools.data.shard import part_by_position

CHINESE = "今天天气很好，我们去公园散步。机器学习是人工智能的一个分支，研究如何让计算机从数据中学习。\n" * 3
RUSSIAN = "Сегодня хорошая погода, пойдём гулять в парк вместе с друзьями и собакой.\n" * 5
ENGLISH = "The same text, read as it was written, by whatever program wrote it.\n" * 5

#: (encoding it is written in, the text)
WRITTEN = [
    ("utf-8", CHINESE),
    ("utf-8-sig", CHINESE),
    ("gbk", CHINESE),
    ("gb18030", CHINESE + "𠀀"),
    ("utf-16", CHINESE),
    ("utf-16-le", CHINESE),
    ("utf-16-be", ENGLISH),
    ("utf-16", ENGLISH),
    ("utf-32", ENGLISH),
    ("big5", "今天天氣很好，我們去公園散步。機器學習是人工智慧的一個分支。\n" * 5),
    ("cp1251", RUSSIAN),
    ("koi8-r", RUSSIAN),
]


def read(path, **how):
    reading = Reading(**how)
    return list(read_documents(path, reading, lambda index: True)), reading.tally


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "jsonl.zst", "json"])
@pytest.mark.parametrize(("encoding", "text"), WRITTEN)
def test_text_is_read_as_it_was_written(tmp_path, encoding, text, kind):
    documents = [text] if kind.startswith("txt") else [text, text[:10], text]
    content = text
    if kind.startswith("jsonl"):
        content = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in documents)
    elif kind == "json":
        content = json.dumps([{"text": t} for t in documents], ensure_ascii=False)
    path = tmp_path / f"a.{kind}"
    data = content.encode(encoding)
    if kind.endswith("zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    got, tally = read(path)
    assert got == documents
    assert tally.counts() == {}
    marked = encoding.startswith("utf-8") or encoding in ("utf-16", "utf-32")
    assert bool(tally.encodings) == (not marked), "what was guessed is said"
    assert read(path, encoding=encoding)[0] == documents


def test_line_ends_are_one_character(tmp_path):
    for index, encoding in enumerate(("utf-8", "utf-16", "gb18030")):
        path = tmp_path / f"{index}.txt"
        path.write_bytes("一二三\r\n四五六\r七八九\n".encode(encoding))
        assert read(path, encoding=encoding)[0] == ["一二三\n四五六\n七八九\n"]


def test_few_bytes_that_are_no_text_are_counted(tmp_path):
    content = (ENGLISH * 10).encode()
    (tmp_path / "a.txt").write_bytes(content[:500] + b"\xff" + content[500:1000] + b"\xfe" + content[1000:])
    (text,), tally = read(tmp_path / "a.txt")
    assert text.count("�") == 2
    assert tally.counts() == {"replaced_characters": 2}
    line = b'{"text": "' + b"low rank " * 300 + b'\xff"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 2)
    texts, tally = read(tmp_path / "a.jsonl")
    assert [text.count("�") for text in texts] == [1, 1]
    assert tally.counts() == {"replaced_characters": 2}


FRENCH = (
    "L'été dernier, très fâché, le garçon naïf mangeait des crêpes à l'hôtel, où les élèves répétaient.\n"
)
GERMAN = "Die Straße führt über die Brücke; schöne Gärten und größere Häuser gehören älteren Bürgern.\n"
SPANISH = "El niño pequeño corrió por la montaña hasta el río. ¿Dónde está el señor Muñoz mañana?\n"
ITALIAN = "La città è più bella, perché lunedì l'università sarà chiusa; però il caffè è già là.\n"
SWEDISH = "Det är svårt att förstå varför hon inte åkte till Göteborg på lördag; våren är här.\n"
POLISH = "Żona mówi, że źle śpię, ponieważ piję za dużo kawy; księżyc świecił nad łąką całą noc.\n"
CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy; děti si hrály u řeky, zatímco město rostlo.\n"
TURKISH = "Öğretmen şöyle dedi: yarın sınav olacak, çocuklar bahçede güneşli günlerde oynuyor.\n"
TAIWANESE = "今天天氣很好，我們去公園散步。機器學習是人工智慧的一個分支，研究如何讓電腦學習。\n"
JAPANESE = "今日は天気がとても良いので、友達と公園へ散歩に行きます。私の鍵はどこですか？\n"
KOREAN = "오늘은 날씨가 좋아서 친구들과 함께 공원에 산책하러 갑니다. 내 열쇠는 어디에 있습니까?\n"
GREEK = "Σήμερα ο καιρός είναι καλός, γι' αυτό θα πάμε βόλτα στο πάρκο με τους φίλους μας.\n"

#: A text, the encodings in which it has to be read as it was written.
CERTAIN = [
    (CHINESE, "gbk gb18030 gb2312 utf-16 utf-16-le utf-16-be"),
    (TAIWANESE, "big5 gbk utf-16 utf-16-be"),
    (JAPANESE, "shift_jis cp932 euc_jp iso2022_jp utf-16 utf-16-le"),
    (KOREAN, "euc_kr cp949 utf-16 utf-16-le"),
    (RUSSIAN, "cp1251 koi8-r iso8859-5 cp866 utf-16 utf-16-le"),
    (GREEK, "cp1253 utf-16-be"),
    (ENGLISH, "utf-16 utf-16-le utf-16-be"),
    (FRENCH, "mac_roman utf-16"),
    (GERMAN, "latin-1 cp1252 cp1250 iso8859-15 iso8859-2 mac_roman cp850 utf-16-le"),
    (SPANISH, "latin-1 cp1252 cp850"),
    (POLISH, "cp1250 cp852 utf-16"),
    (CZECH, "cp1250 iso8859-2"),
    ("The chief – who spoke at a café – said: “we are here, and the company’s fiancée isn’t”.\n", "cp1252"),
    ("# layer norm\n" * 99 + CHINESE + "def f(x): return x\n" * 99, "gbk"),
]
#: A text, its encoding, and the words by which it is refused where none is given.
DIFFERING = [
    (FRENCH, "latin-1", 'cp1252 ("naïf"), cp1250 ("naďf") or cp1257 ("naļf")'),
    (ITALIAN, "cp1252", 'cp1252 ("sarà"), cp1250 ("sarŕ"), cp1257 ("sarą") or another'),
    (SWEDISH, "latin-1", 'cp1252 ("åkte"), cp1250 ("ĺkte"), iso8859_3 ("ċkte") or another'),
    (POLISH, "iso8859-2", 'iso8859_2 ("Żona"), cp1257 ("Æona") or'),
    (TURKISH, "cp1254", 'cp1252 ("þöyle"), cp1250 ("ţöyle"), cp1254 ("şöyle") or another'),
    (GERMAN * 3 + "Voilà!\n", "cp1252", 'cp1252 ("Voilà"), cp1250 ("Voilŕ") or cp1257 ("Voilą")'),
]
#: Bytes that several encodings read, and none of them certainly.
AMBIGUOUS = [
    "un garçon".encode("latin-1"),
    "è vero".encode("latin-1"),
    "好的".encode("gbk"),
    "да".encode("koi8-r"),
]


def test_what_it_is_in_is_certain_or_refused(tmp_path):
    path = tmp_path / "a.txt"
    for text, encodings in CERTAIN:
        for encoding in encodings.split():
            path.write_bytes(text.encode(encoding))
            assert read(path)[0] == [text], encoding
    for content in AMBIGUOUS:
        path.write_bytes(content)
        with pytest.raises(
            Act24Error, match=r"in UTF-8, and what else it may be is ambiguous; set data\.enc"
        ):
            read(path)


def test_what_encodings_of_latin_script_read_differently_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    for text, encoding, words in DIFFERING:
        path.write_bytes(text.encode(encoding))
        with pytest.raises(Act24Error, match=r"say which with data\.encoding$") as refused:
            read(path)
        assert f"a.txt is {words}" in str(refused.value)
        assert len(str(refused.value)) < 300 + len(str(tmp_path))
        assert read(path, encoding=encoding)[0] == [text]


def test_so_is_a_stream_in_which_they_differ_late(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": GERMAN}, ensure_ascii=False) + "\n"] * 3000
    alike = json.dumps({"text": "Ärzte" + " low rank" * 40000}, ensure_ascii=False)  # mac_roman: ƒrzte
    path.write_bytes("".join([*lines, alike]).encode("cp1252"))
    assert len(read(path)[0]) == 3001
    path.write_bytes("".join([*lines, '{"text": "voilà"}']).encode("cp1252"))
    with pytest.raises(Act24Error, match=r'a.jsonl is cp1252 \("voilà"\), cp1250 \("voilŕ"\) or cp1257'):
        read(path)
    assert read(path, encoding="cp1252")[0][-1] == "voilà"


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_that_goes_on_in_another_encoding_is_refused(tmp_path, kind):
    """What every codec takes, and nobody wrote."""

    def content(text, encoding, times):
        line = text if kind == "txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n"
        return (line * times).encode(encoding)

    path = tmp_path / f"a.{kind}"
    heads = [
        (CHINESE, "utf-16"),
        (ENGLISH, "utf-16"),
        (RUSSIAN, "utf-16-be"),
        (CHINESE, "gbk"),
        (JAPANESE, "shift_jis"),
        (GERMAN * 3, "latin-1"),
        (RUSSIAN, "cp1251"),
        (CHINESE, "utf-8"),
    ]
    tails = [(CHINESE, "utf-8"), (ENGLISH, "utf-16-be"), (TAIWANESE * 3, "big5"), (KOREAN * 3, "euc_kr")]
    for text, encoding in heads:
        for tail, other in [(ENGLISH, "utf-8"), *tails] if encoding.startswith("utf-16") else tails:
            if encoding != other:
                path.write_bytes(content(text, encoding, 40) + content(tail, other, 20))
                with pytest.raises(Act24Error, match=rf"{SHARE} (are no text|.*ambiguous)|one JSON object"):
                    read(path)
    long = b"".join(content(f"第{number}段：{CHINESE}", "gbk", 1) for number in range(500))
    path.write_bytes(long + content(CHINESE, "utf-8", 1))
    with pytest.raises(Act24Error, match=rf"{SHARE} are no text in gb18030; set.* it is in, or"):
        read(path)
    path.write_bytes(long + content(CHINESE[:30], "utf-8", 1))
    assert 10 < read(path)[1].replaced < 60, "a line of it is counted"


SHARE = r"\d+\.\d% of its [\d,]+ characters"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_many_bytes_that_are_no_text_are_refused(tmp_path, name):
    path = tmp_path / name
    noise = bytes(range(128, 256)) * 20
    path.write_bytes(noise if name == "a.txt" else b'{"text": "' + noise + b'"}\n')
    with pytest.raises(Act24Error, match=rf"{name}: {SHARE} are no text in UTF-8.*set data"):
        read(path)
    chinese = CHINESE if name == "a.txt" else json.dumps({"text": CHINESE}, ensure_ascii=False)
    path.write_bytes(chinese.encode("gbk"))
    with pytest.raises(Act24Error, match=rf"{name}: {SHARE} are no text in utf-8; set.*, leave it out to"):
        read(path, encoding="utf-8")
    if name == "a.jsonl":  # said before a model has read the file
        path.write_bytes(f"{chinese}\n".encode("gbk") * 1000)
        texts = read_documents(path, Reading(encoding="utf-8"), lambda index: True)
        with pytest.raises(Act24Error, match=SHARE):
            list(itertools.islice(texts, 100))
    data = Data(source="files", train_files=(str(path),), encoding="klingon")
    with pytest.raises(Act24Error, match=r'data\.encoding = "klingon" is no encoding of text'):
        open_documents(data, "train")


def written(path, texts):
    """A file of records, U+FFFD as a JSON escape."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".arrow"])
def test_characters_that_were_replaced_when_the_file_was_written_are_too(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    written(path, [CHINESE.encode("gbk").decode("utf-8", "replace")] * 3)
    with pytest.raises(Act24Error, match=rf"{SHARE} are U\+FFFD.*anew.*set data\.encoding"):
        read(path)
    texts, tally = read(path, encoding="utf-8")
    assert tally.replaced == sum(text.count("\ufffd") for text in texts) > 100
    written(path, [ENGLISH * 100 + "\ufffd"])
    assert read(path)[1].counts() == {"replaced_characters": 1}


def test_those_of_a_text_file_are_too(tmp_path):
    (tmp_path / "b.txt").write_text(CHINESE.encode("gbk").decode("utf-8", "replace"), encoding="utf-8")
    with pytest.raises(Act24Error, match=rf"{SHARE} are U\+FFFD.*anew.*set data\.encoding"):
        read(tmp_path / "b.txt")
    assert read(tmp_path / "b.txt", encoding="utf-8")[1].replaced > 100
    (tmp_path / "a.txt").write_text(ENGLISH * 100 + "\ufffd", encoding="utf-8")
    assert read(tmp_path / "a.txt")[1].counts() == {"replaced_characters": 1}


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_in_either_format(tmp_path, make):
    """The second is what `datasets` saves."""
    table = pyarrow.table({"body": ["a", None, "c"] * 3, "n": range(9)})
    with make(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    how = Reading("body")
    got = list(read_documents(tmp_path / "a.arrow", how, lambda index: index != 2))
    assert got == ["a", "", None, "a", "", "c", "a", "", "c"]
    with pytest.raises(Act24Error, match=r"no field 'text'; set data\.text_field to one of: body, n"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_an_arrow_file_with_a_flipped_byte_does_not_end_the_process(tmp_path, make):
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": [f"low rank {index}" for index in range(40)]})
    with make(path, table.schema) as writer:
        writer.write_table(table)
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), 3):
        content = bytearray(whole)
        content[at] ^= 0xFF
        path.write_bytes(content)
        try:
            read(path)
        except Act24Error as error:
            refused += str(path) in str(error)
    assert refused > 30


# --------------------------------------------------------------------------------------------- little text


def files(*paths, **keys):
    return Data(source="files", train_files=tuple(map(str, paths)), max_length=16, **keys)


def test_one_text_file_is_enough(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(ENGLISH * 20)
    data = files(tmp_path / "a.txt")
    (train,), (heldout,) = (list(open_documents(data, split)) for split in ("train", "heldout"))
    assert train + heldout == ENGLISH * 20
    assert 0.04 < len(heldout) / len(train + heldout) < 0.08
    assert heldout.startswith("The same"), "it is cut behind a line"
    with open_rows(data, tokenizer, batch_size=1, vocab_size=300) as rows:
        next(rows)
        remarks = rows.remarks()
        assert any("one document cannot be shuffled" in line for line in remarks)
        assert any("the last twentieth of each is held out" in line for line in remarks)
        assert rows.remarks() == [], "once"
    with open_rows(
        data.model_copy(update={"shuffle_buffer": 9}), tokenizer, batch_size=1, vocab_size=300
    ) as rows:
        next(rows)
        assert any("one document cannot be shuffled" in line for line in rows.remarks()), "nor in a buffer"
    (tmp_path / "a.jsonl").write_text('{"text": "one two three four five six seven eight nine ten"}\n' * 60)
    for buffer in (0, 9):
        records = files(tmp_path / "a.jsonl", shuffle_buffer=buffer)
        with open_rows(records, tokenizer, batch_size=1, vocab_size=300) as rows:
            next(rows)
            assert any("one file cannot be shuffled" in line for line in rows.remarks()) == (not buffer)
    assert heldout_rows(data, tokenizer, 10, vocab_size=300).tokens >= 10


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_documents_of_which_hashing_holds_out_none_are_split_by_position(tmp_path, count):
    texts = [f"document {index} " + "of a few words " * 9 for index in range(40)]
    texts = [text for text in texts if _hash_keeps(text)][:count]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, heldout = (
        list(open_documents(files(tmp_path / "a.jsonl"), split)) for split in ("train", "heldout")
    )
    assert [a + b for a, b in zip(train, heldout, strict=True)] == texts


def _hash_keeps(text):
    from act24.tools.data.shard import is_heldout

    return not is_heldout(text)


def test_what_is_cut_where():
    text = "a line\n" * 30
    assert part_by_position("train", text) + part_by_position("heldout", text) == text
    assert part_by_position("train", text).endswith("\n")
    words = "word " * 30
    assert part_by_position("train", words).endswith("word ")
    assert len(part_by_position("heldout", "x" * 100)) == 5
    assert part_by_position("heldout", "short") == ""
    assert part_by_position("train", "short") == "short"


# ----------------------------------------------------------------------------------------- what is counted


def test_what_is_wrong_is_counted_and_shown(tmp_path, tokenizer):
    records = [{"text": f"low rank {index}"} for index in range(150)]
    records[3:3] = [{"text": ""}, {"text": None}, {"text": "low rank 0"}, {"txt": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "b.txt").write_bytes(CHINESE.encode("gbk"))
    (tmp_path / "notes.pdf").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "held.md").write_text("two of four")
    data = files(tmp_path, heldout_files=(str(tmp_path / "held.md"),), on_bad_record="skip")
    with open_rows(data, tokenizer, batch_size=1, vocab_size=300) as rows:
        while rows.epoch == 0:
            next(rows)
        counts, remarks = rows.faults(), rows.remarks()
    assert {key: counts[key] for key in ("empty_documents", "repeated_documents")} == {
        "empty_documents": 2 * (counts["dropped_records"]),
        "repeated_documents": 1,
    }
    assert remarks[0] == "1 file is read as gb18030, as detected; data.encoding sets another"
    assert remarks[1] == f"1 file of unknown kind is left out: {tmp_path}/notes.pdf"
    assert remarks[2].endswith("empty documents, 1 repeated document")


def test_counts_go_on_where_a_run_does(tmp_path, tokenizer):
    records = [{"text": f"low rank {index}" if index % 10 else ""} for index in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = files(tmp_path / "a.jsonl")

    def counts_after(batches, state=None):
        with open_rows(data, tokenizer, batch_size=1, vocab_size=300) as rows:
            if state:
                rows.load_state_dict(state)
            for _ in range(batches):
                next(rows)
            return rows.state_dict()

    straight = counts_after(30)
    assert counts_after(20, counts_after(10)) == straight
    (stream,) = straight["position"]["streams"].values()
    assert stream["position"]["document"]["tally"]["empty"] > 2
