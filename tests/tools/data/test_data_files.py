"""Which files a glob means, what is read from each kind, and one clear line for each kind of damage."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from act24.errors import Act24Error
from act24.tools.data.files import Reading, find_files, read_documents


def read(path, text_field="text", wanted=lambda index: True):
    return list(read_documents(path, Reading(text_field), wanted))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.gz", "a.py"])
def test_a_text_file_is_one_document(tmp_path, name):
    path = tmp_path / name
    text = "line one\n\nüber\n"
    content = text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(path) == [text]


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json.gz", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_json_lines_are_one_document_each(tmp_path, name):
    path = tmp_path / name
    content = "".join(json.dumps({"text": f"t{i}\n", "n": i}) + "\n" for i in range(5)).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(path) == [f"t{i}\n" for i in range(5)]
    assert read(path, wanted=lambda index: index in (1, 4)) == [None, "t1\n", None, None, "t4\n"]


def test_a_json_array_is_a_list_of_documents(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert read(path) == ["a", "b"]


def test_parquet_rows_and_skipped_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": [f"t{i}" for i in range(7)] + [None], "n": list(range(8))})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    assert read(path, "body") == [f"t{i}" for i in range(7)] + [""]
    assert read(path, "body", lambda index: index >= 4) == [None] * 4 + ["t4", "t5", "t6", ""]


def test_half_a_pair_is_no_text(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "half a pair? \\ud83d"}\n')
    how = Reading()
    assert list(read_documents(tmp_path / "a.json", how, lambda index: True)) == ["half a pair? ?"]
    assert how.tally.replaced == 1


def test_globs_files_and_folders(tmp_path):
    for name in ("b.txt", "a.md", "deep/er/c.jsonl.gz", "deep/note.pdf", "d.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*patterns):
        return [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path / p) for p in patterns)]

    assert names(".") == ["a.md", "b.txt", "d.parquet", "deep/er/c.jsonl.gz"]
    assert names("*.txt", "b.*") == ["b.txt"]
    assert names("**/*.gz") == ["deep/er/c.jsonl.gz"]
    assert names("b.txt", "deep") == ["b.txt", "deep/er/c.jsonl.gz"]
    with pytest.raises(Act24Error, match=r"no data file matches '.*\*\.json'"):
        names("a.md", "*.json")
    with pytest.raises(Act24Error, match=r"note\.pdf: not a kind of file"):
        names("deep/*.pdf")


def test_a_folder_of_unknown_kinds_only_names_them(tmp_path):
    for name in ("b.docx", "a.pdf", ".hidden"):
        (tmp_path / name).touch()
    with pytest.raises(Act24Error, match=r"a\.pdf and 1 more: not a kind of file that is read here"):
        find_files([str(tmp_path)])
    with pytest.raises(Act24Error, match="no data file matches"):
        find_files([str(tmp_path / "*.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Act24Error, match=r"there is no file in '.*empty'"):
        find_files([str(tmp_path / "empty")])


def truncated_gzip(path):
    path.write_bytes(gzip.compress(json.dumps({"text": "x" * 10_000}).encode())[:-12])


def not_gzip(path):
    path.write_bytes(b"plain")


def flipped_gzip(path):
    content = bytearray(gzip.compress(bytes(range(256)) * 40))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated_gzip, not_gzip, flipped_gzip])
def test_a_corrupt_gzip_is_named(tmp_path, damage):
    path = tmp_path / "a.txt.gz"
    damage(path)
    with pytest.raises(Act24Error, match=r"cannot read .*a\.txt\.gz: .+"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: expected one JSON object a line"),
        (
            "a.jsonl",
            '{"txt": "x", "url": "y"}\n',
            r"line 1: no field 'text'; set data.text_field to one of: txt, url",
        ),
        (
            "a.jsonl",
            '{"text": "x"}\n{"n": 1, "body": "x", "t": null}\n',
            r"a.jsonl, line 2: no field 'text'; set data.text_field to one of: body, t, not n, where",
        ),
        ("a.jsonl", '{"n": 1, "turns": []}', r"line 1: no field 'text', and no text in its fields: n, turns"),
        ("a.jsonl", "{}", r"line 1: no field 'text': the record is empty"),
        ("a.jsonl", json.dumps({f"{i}" * 99: "x" for i in range(99)}), r"one of: 0{30}, .{150,170}, … \("),
        ("a.jsonl", '"x"\n', r"line 1: expected an object with a field 'text', got str"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: field 'text' holds int, not text"),
        ("a.parquet", "no parquet at all", r"cannot read .*a\.parquet: "),
        ("a.arrow", "", r"cannot read .*a\.arrow: it is empty, and an Arrow file begins with a schema"),
    ],
)
def test_bad_records_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(Act24Error, match=message):
        read(tmp_path / name)


def test_a_missing_parquet_column_lists_those_present(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(Act24Error, match=r"no field 'text'; set data\.text_field to one of: body, n"):
        read(tmp_path / "a.parquet")


def test_a_file_that_went_away_is_named(tmp_path):
    with pytest.raises(Act24Error, match=r"cannot read .*gone\.txt"):
        read(tmp_path / "gone.txt")
