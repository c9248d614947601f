"""A small corpus in every kind of file, and a tokenizer trained on it."""

import gzip
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from act24.recipes import schema
from act24.recipes.schema import Data
from act24.tools.data import Tokenizer, prepare_shards
from act24.tools.data.tokenizer import _train

WORDS = [
    "low",
    "rank",
    "sparse",
    "über",
    "two",
    "of",
    "four",
    "tokens",
    "日本",
    "the",
    "a",
    "graph",
    "pass\nrow",
]


def make_documents(seed: int, count: int, longest: int = 60) -> list[str]:
    """Texts of 1 to `longest` words; some repeat, one is empty."""
    rng = random.Random(seed)
    texts = [f"{seed}:{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for i in range(count)]
    return [*texts[:3], "", *texts[3:]]


@dataclass
class Corpus:
    """Files of one kind, and the non-empty documents in the order of sorted files."""

    folder: Path
    glob: str
    documents: list[str]

    def data(self) -> schema.Data:
        """These files, all of them in both splits, so that nothing depends on what is held out."""
        heldout = self.folder.parent / f"{self.folder.name}-heldout"
        if not heldout.exists():
            shutil.copytree(self.folder, heldout)  # copies: a file in both lists is not trained on
        return schema.Data(
            source="files",
            train_files=(str(self.folder / self.glob),),
            heldout_files=(str(heldout / self.glob),),
            max_length=32,
        )


def write_text(folder: Path, texts: list[str]) -> None:
    for index, text in enumerate(texts):
        name = folder / f"{index:03d}.{'md' if index % 2 else 'txt'}"
        if index % 3:
            name.write_text(text, encoding="utf-8", newline="")
        else:
            with gzip.open(f"{name}.gz", "wt", encoding="utf-8", newline="") as file:
                file.write(text)


def write_json_lines(folder: Path, texts: list[str]) -> None:
    for shard in range(4):  # C4's layout
        with gzip.open(folder / f"c4-train.{shard:05d}-of-00004.json.gz", "wt", encoding="utf-8") as file:
            for text in texts[shard * len(texts) // 4 : (shard + 1) * len(texts) // 4]:
                file.write(json.dumps({"text": text, "url": "x"}) + "\n")


def write_parquet(folder: Path, texts: list[str]) -> None:
    for shard in range(3):
        part = texts[shard * len(texts) // 3 : (shard + 1) * len(texts) // 3]
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        pyarrow.parquet.write_table(table, folder / f"{shard}.parquet", row_group_size=4)


WRITERS = {"text": write_text, "json": write_json_lines, "parquet": write_parquet}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> dict[str, Corpus]:
    made = {}
    for seed, (kind, write) in enumerate(WRITERS.items()):
        folder = tmp_path_factory.mktemp("corpus") / kind
        folder.mkdir()
        texts = make_documents(seed, 26)
        write(folder, texts)
        made[kind] = Corpus(folder, "*", [text for text in texts if text])
    return made


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(_train(make_documents(0, 100), 300), "small")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def t5_backend() -> tokenizers.Tokenizer:
    """Like T5's: adds "</s>" by itself, can truncate and pad, and has sentinels past the vocabulary."""
    words = sorted({word for text in make_documents(0, 50) for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(10))])
    template = tokenizers.processors.TemplateProcessing
    backend.post_processor = template("$A </s>", special_tokens=[("</s>", 1)])
    return backend


@pytest.fixture(scope="session")
def sources(corpora, tokenizer, tmp_path_factory) -> dict[str, Data]:
    shards = tmp_path_factory.mktemp("prepared") / "shards"
    prepare_shards(corpora["json"].data(), tokenizer, shards)
    return {
        **{kind: corpus.data() for kind, corpus in corpora.items()},
        "builtin": Data(source="builtin", max_length=32),
        "shards": Data(source="shards", shards=str(shards), max_length=32),
    }
