"""`act24 data prepare`: what its arguments mean, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from act24.recipes.load import load_recipe, recipe_names
from act24.recipes.schema import Data, Section, Tokenizer
from act24.tools.commands.options import refuse_ignored
from act24.tools.data import data_from_argument, open_tokenizer, pinned_for, prepare_shards, refuse_taken
from act24.tools.data.files import LINES, TEXT, find_files, suffix
from act24.tools.run.progress import console
from act24.words import counted

S = TypeVar("S", bound=Section)


def prepare_source(
    source: str,
    out: Path,
    tokenizer: str | None,
    vocab_size: int | None,
    max_tokens: int | None,
    max_heldout_tokens: int | None,
    text_field: str | None = None,
    encoding: str | None = None,
    skip_bad_records: bool = False,
    end_of_text: str | None = None,
) -> None:
    """Write token shards of a source, or of a recipe's data with the recipe's own tokenizer; what is given
    beyond that goes before the recipe."""
    refuse_taken(out)
    if source.endswith(".toml") or source in recipe_names():
        recipe = load_recipe(source)
        data, section = recipe.data, recipe.tokenizer
    else:
        data, section = data_from_argument(source), Tokenizer(vocab_size=32000)
    _refuse_ignored(data, text_field, encoding, skip_bad_records)
    on_bad_record = "skip" if skip_bad_records else None
    data = _with(data, text_field=text_field, encoding=encoding, on_bad_record=on_bad_record)
    section = _with(section, name=tokenizer, vocab_size=vocab_size, end_of_text=end_of_text)
    if section.name != "bpe":
        refuse_ignored({"--vocab-size": vocab_size}, f"the tokenizer is {section.name}, and has its own")
    data = pinned_for(data, out)
    opened = open_tokenizer(data, section)
    with console.status("reading") as status:
        index = prepare_shards(
            data,
            opened,
            out,
            max_tokens=max_tokens,
            max_heldout_tokens=max_heldout_tokens,
            progress=lambda split, documents, tokens: status.update(
                f"{split}: {counted(documents, 'document')}, {counted(tokens, 'token')}"
            ),
        )
    for name, split in index["splits"].items():
        print(f"{name}: {counted(split['tokens'], 'token')} in {counted(split['documents'], 'document')}")
        for line in split["remarks"]:
            print(f"{name}: {line}")
    print(f'train on it with --set data.source=shards --set data.shards="{out}" --set tokenizer.name=bpe')


def _with(section: S, **given: object) -> S:
    """A recipe's section with what is not None."""
    return section.model_copy(update={key: value for key, value in given.items() if value is not None})


def _refuse_ignored(data: Data, text_field: str | None, encoding: str | None, skip_bad: bool) -> None:
    """Raises Act24Error for options that no file of the source heeds."""
    of_records = {"--text-field": text_field, "--skip-bad-records": skip_bad}
    if data.source == "hf":
        refuse_ignored({"--encoding": encoding}, "records of the Hub are text already")
    if data.source == "builtin":
        refuse_ignored(of_records | {"--encoding": encoding}, "the builtin text is UTF-8, and no records")
    if data.source != "files" or not any((text_field, encoding, skip_bad)):
        return
    kinds = {suffix(path) for path in find_files((*data.train_files, *data.heldout_files))}
    if kinds <= {*TEXT}:
        refuse_ignored(of_records, f"{', '.join(sorted(kinds))} files are one text each, and no records")
    if not kinds & {*TEXT, *LINES}:
        refuse_ignored({"--encoding": encoding}, f"{', '.join(sorted(kinds))} files say theirs themselves")
