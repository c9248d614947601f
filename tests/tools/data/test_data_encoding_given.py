"""An encoding that is given, against what the bytes say; and pages of Chinese and code, whose is not."""

import json
from pathlib import Path

import pytest

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data import open_documents
from act24.tools.data.encoding import decoded
from act24.tools.data.tally import Tally

ROOT = Path(__file__).parents[3]
CHINESE = (
    "稀疏训练与低秩分解：半结构化稀疏，反量化与梯度。验证损失、困惑度与吞吐量，都写在表里。学习率先升后降。\n"
)


@pytest.mark.parametrize(
    ("written", "declared", "why"),
    [
        ("utf-8", "latin-1", "its bytes are UTF-8"),
        ("utf-8", "cp437", "its bytes are UTF-8"),
        ("utf-8", "gb18030", "its bytes are UTF-8"),
        ("utf-8", "utf-16-le", "its bytes are UTF-8"),
        ("utf-16", "latin-1", "its byte-order mark says utf-16:"),
        ("utf-8-sig", "gbk", "its byte-order mark says utf-8:"),
        ("cp1252", "latin-1", "of its characters are control characters"),
    ],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_an_encoding_that_the_bytes_contradict_is_refused(tmp_path, written, declared, why, kind):
    """Read so it would train as characters that nobody wrote, and its bits per byte look better."""
    file = tmp_path / f"a.{kind}"
    whole = "“A few” – and ‘some’ more…\n" * 40 if written == "cp1252" else CHINESE * 8
    text = whole if kind == "txt" else json.dumps({"text": whole}, ensure_ascii=False) + "\n"
    file.write_bytes(text.encode(written))
    data = Data(source="files", train_files=(str(file),), encoding=declared)
    with pytest.raises(Act24Error, match=rf'data.encoding = "{declared}", and .*{why}'):
        [*open_documents(data, "train")]


@pytest.mark.parametrize("encoding", ["gb18030", "big5"])
def test_pages_that_mix_chinese_and_code_are_detected(encoding):
    """Words of many kinds alone told nothing; the whole page does."""
    page = (ROOT / "docs/write-a-pass.zh.md").read_text(encoding="utf-8")
    content = page.encode(encoding, "ignore")
    tally = Tally()
    assert decoded(content, None, "page", tally) == content.decode(encoding)
    assert tally.encodings["page"] == encoding
