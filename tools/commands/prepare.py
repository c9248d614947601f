"""`act24 data prepare`: what its arguments mean, and what it says."""

from __future__ import annotations

from pathlib import Path

from act24.recipes.load import load_recipe, recipe_names
from act24.recipes.schema import Tokenizer
from act24.tools.data import data_from_argument, open_tokenizer, pinned_for, prepare_shards, refuse_taken
from act24.tools.run.progress import console


def prepare_source(
    source: str,
    out: Path,
    tokenizer: str,
    vocab_size: int,
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
        data, section = data_from_argument(source), Tokenizer(name=tokenizer, vocab_size=vocab_size)
    given: dict[str, object] = {"text_field": text_field, "encoding": encoding}
    given["on_bad_record"] = "skip" if skip_bad_records else None
    data = data.model_copy(update={key: value for key, value in given.items() if value is not None})
    if end_of_text is not None:
        section = section.model_copy(update={"end_of_text": end_of_text})
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
                f"{split}: {documents:,} documents, {tokens:,} tokens"
            ),
        )
    for name, split in index["splits"].items():
        print(f"{name}: {split['tokens']:,} tokens in {split['documents']:,} documents")
        for line in split["remarks"]:
            print(f"{name}: {line}")
    print(f'train on it with --set data.source=shards --set data.shards="{out}" --set tokenizer.name=bpe')
