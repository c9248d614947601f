"""`act24 export`: a run's model for other programs, as a folder that `transformers` opens.

    form    when                                     what the folder computes
    llama   no relu², low rank multiplies out        the function that was trained
    arcee   every network is relu² (`relu2_ffn`)     the same; 2:4 activations dense
    act24   everything else, or where asked for      the function that was trained; act24 has to be installed
    peft    where asked for, of `lora`               the adapter alone, for the model that the run began with
    gguf    a llama or an arcee, where asked for     as these; one file, for llama.cpp

2:4 weights are written as the function has them: masked, exactly 2:4, in every form.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.options import one_of
from act24.passes import Activation24, Pass, PassError, Pipeline, Relu2FFN, Weight24
from act24.passes.recovery import check_zeros, has_masks, kept_masks
from act24.passes.served import served_passes, served_weights
from act24.tools.data import Tokenizer
from act24.tools.files import even_modes_, whole_folder
from act24.tools.huggingface.adapter import PEFT, write_adapter
from act24.tools.huggingface.config import ACT24, ARCEE, LLAMA, config_of, uneven_heads
from act24.tools.huggingface.folder import without_tied_head, write_pretrained
from act24.tools.huggingface.gguf_file import write_gguf
from act24.tools.huggingface.tokenizer_files import GENERATION, ends, padding, write_tokenizer
from act24.tools.pruning.masks import Masks, check_pruned, write_masks
from act24.tools.run.build import Built, generation_of, load

GGUF = "gguf"
FORMS = ("auto", LLAMA, ARCEE, ACT24, GGUF, PEFT)

#: Held-out tokens on which the difference between 2:4 and dense activations is measured.
MEASURED_TOKENS = 65_536


@dataclass(frozen=True)
class Exported:
    """A model as it is written."""

    kind: str
    config: LlamaConfig
    state: dict[str, Tensor]
    passes: tuple[Pass, ...] = ()
    pattern: str = ""
    masks: Masks | None = None


def export_run(path: Path, out: Path, form: str = "auto", dense_weights: bool = False) -> str:
    """Write the model of a run's last checkpoint, of a checkpoint, or of a folder that act24 opens, into the
    new folder `out`, or as the file `out` in the form "gguf".

    Args:
        form: "auto" takes the first of llama, arcee and act24 that holds the model.
        dense_weights: write the dense master weights behind `weight24` in place of the masked ones, which are
            the function that was trained.

    Returns:
        what was written, and what a reader of it computes.

    Raises:
        Act24Error: nothing to export, a form that does not hold the model, or `out` exists or cannot be
            written.
    """
    one_of("export", "form", form, FORMS)
    if out.exists():
        raise Act24Error(f"{out} exists already")
    built = load(path)
    if dense_weights and (form == PEFT or not _pattern(built.pipeline)):
        why = (
            "an adapter is written without the weights"
            if form == PEFT
            else f"{path} has no weight24 in force"
        )
        raise Act24Error(f"--dense-weights would be ignored: {why}")
    if form == PEFT:
        return write_adapter(built, out)
    if not isinstance(built.model, LlamaForCausalLM):
        return _export_foreign(path, built, out, form, dense_weights)
    tokenizer = built.tokenizer
    exported = exported_form(built, "auto" if form == GGUF else form, dense_weights)
    config = exported.config
    if tokenizer is not None:
        named = {"eos_token_id": ends(config, tokenizer), "pad_token_id": padding(config, tokenizer)}
        config = dataclasses.replace(config, **named)
    zeros = _zeros(built.pipeline, exported.masks, dense_weights)
    remarks = _remarks(path, built, exported.kind, zeros, dense_weights)
    if form == GGUF:
        _write_gguf(out, exported, tokenizer)
        remarks[0] = f'a GGUF of architecture "{exported.kind}", step {built.step}'
        return "\n".join((f"{out}: {remarks[0]}", *remarks[1:]))
    with whole_folder(out) as written:
        content = (config, exported.kind, exported.state)
        write_pretrained(written, *content, passes=exported.passes, pattern=exported.pattern)
        if exported.masks is not None:
            write_masks(written, exported.masks)
        if tokenizer is not None:
            positions = config.max_position_embeddings
            write_tokenizer(written, tokenizer, config, positions, generation_of(built))
        if (path / GENERATION).is_file():  # of a Hugging Face folder
            shutil.copyfile(path / GENERATION, written / GENERATION)
        _write_card(written, out.name, remarks)
    return "\n".join((f"{out}: {remarks[0]}", *remarks[1:]))


def _write_card(folder: Path, title: str, remarks: Sequence[str]) -> None:
    card = "\n\n".join(remarks)
    (folder / "README.md").write_text(f"# {title}\n\n{card}\n", encoding="utf-8")


def _write_gguf(out: Path, exported: Exported, tokenizer: Tokenizer | None) -> None:
    if exported.kind == ACT24:
        raise Act24Error('the model has no form "gguf": llama.cpp knows LLaMA and Arcee, and it is neither')
    if tokenizer is None:
        raise Act24Error('a GGUF has its tokenizer in it, and there is no tokenizer.json: no form "gguf"')
    write_gguf(out, exported.config, exported.kind, exported.state, tokenizer, out.stem)


def save_pretrained(pipeline: Pipeline, folder: str | Path) -> None:
    """Write a rewritten model so that `AutoModelForCausalLM.from_pretrained` opens the same function, with
    act24 installed: `transformers`' own `save_pretrained` would leave out what the passes did.

    Args:
        pipeline: what `act24.apply_` returned, for a stock LLaMA or `transformers`' LlamaForCausalLM or
            ArceeForCausalLM. Another of its causal models is written as itself, where its passes have a form
            in it: low rank is multiplied out, 2:4 weights are masked.
        folder: must not exist.

    Raises:
        Act24Error: another model that has no such form, what was pruned is not zero any more, or `folder`
            exists or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise Act24Error(f"{folder} exists already")
    check_zeros(pipeline)
    if (found := _stock_config(pipeline.model)) is None:
        return _save_foreign(pipeline, folder)
    config, began = found
    state = without_tied_head(served_weights(pipeline), config, "this model")
    passes = (*began, *served_passes(pipeline, without=(Weight24.name,)))
    write_pretrained(folder, config, ACT24, state, passes=passes, pattern=_pattern(pipeline))
    # What `transformers` generates with: a stock model has none.
    if (generation := getattr(pipeline.model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)


def _stock_config(model: torch.nn.Module) -> tuple[LlamaConfig, tuple[Pass, ...]] | None:
    """The stock configuration of a model that was rewritten, and what makes the model of it that the pipeline
    began with: Arcee is a LLaMA with relu² networks. None for other classes."""
    config: Any = getattr(model, "config", None)
    if isinstance(config, LlamaConfig):
        return config, ()
    kind = getattr(config, "model_type", None)
    if kind not in (LLAMA, ARCEE, ACT24):
        return None
    found, passes = config_of(config.to_dict(), "this model's config")
    return found, () if kind == ACT24 else passes  # its pipeline has them


def _save_foreign(pipeline: Pipeline, folder: Path) -> None:
    kind = type(pipeline.model).__name__
    instead = "keep its state_dict() and apply the same passes before load_state_dict()"
    try:
        if computes_24(pipeline):
            raise PassError("it would compute 2:4 activations dense")
        model = foreign_model(pipeline)
    except (PassError, ValueError, AttributeError) as error:  # of `transformers`, where it is no model of its
        why, *_ = str(error).splitlines() or [
            type(error).__name__
        ]  # below it `transformers` lists its classes
        raise Act24Error(f"there is no folder that brings this {kind} back: {why}; {instead}") from error
    if not isinstance(pipeline.model, type(model)):
        raise Act24Error(f"there is no folder that brings a {kind} back; {instead}")
    with whole_folder(folder) as written:
        _write_foreign(model, written, pipeline, _pattern(pipeline))


def exported_form(built: Built, form: str = "auto", dense_weights: bool = False) -> Exported:
    """A model as `export_run` writes it. Raises Act24Error for a form that does not hold it."""
    pipeline, config = built.pipeline, built.model.config
    state = served_weights(pipeline, masked=not dense_weights)
    pattern = "" if dense_weights else _pattern(pipeline)
    masks = Masks(*kept_masks(pipeline)) if has_masks(pipeline) else None
    pattern = masks.pattern if masks is not None else pattern
    if form != ACT24:
        try:
            kind, config, stock = _stock(pipeline, config, state)
            # β of soft 2:4 activations, which the stock forms compute dense.
            for name, _ in built.model.named_buffers():
                stock.pop(name, None)
        except PassError as error:
            if form != "auto":
                told = f'the model has no form "{form}": {error}; export it with --as act24'
                raise Act24Error(told) from error
        else:
            if form not in ("auto", kind):
                raise Act24Error(f'the model has no form "{form}"; export it with --as {kind}')
            if masks is not None:
                check_pruned(stock, masks, "what is exported")
            return Exported(kind, config, stock, pattern=pattern, masks=masks)
    passes = served_passes(pipeline, without=(Weight24.name,))
    return Exported(ACT24, built.model.config, state, passes, pattern, masks)


def computes_24(pipeline: Pipeline) -> bool:
    """Whether the model's activations are 2:4, which no stock form computes."""
    return any(isinstance(p, Activation24) for p in pipeline.active)


def foreign_model(pipeline: Pipeline, masked: bool = True) -> Any:
    """A model of another class than the stock one, as a plain one of that class.

    Args:
        masked: as for `served_weights`.

    Raises:
        PassError: a pass has no stock form.
    """
    import transformers

    rewritten: Any = pipeline.model
    state = pipeline.state_to_stock(served_weights(pipeline, masked))
    config = copy.deepcopy(rewritten.config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=_dtype(state))
    expected = model.state_dict()
    model.load_state_dict({name: value for name, value in state.items() if name in expected})
    if (generation := getattr(rewritten, "generation_config", None)) is not None:
        model.generation_config = generation
    return model


def _dtype(state: dict[str, Tensor]) -> torch.dtype:
    return next(value.dtype for value in state.values() if value.is_floating_point())


def _export_foreign(path: Path, built: Built, out: Path, form: str, dense_weights: bool) -> str:
    """Another class than the stock one leaves as itself."""
    if form != "auto":
        raise Act24Error(f"a {type(built.model).__name__} is exported as what it is: leave --as {form} out")
    try:
        model = foreign_model(built.pipeline, masked=not dense_weights)
    except PassError as error:
        instead = "act24.load opens the run itself"
        raise Act24Error(f"the model has no form that transformers opens: {error}; {instead}") from error
    pattern = "" if dense_weights else _pattern(built.pipeline)
    with whole_folder(out) as written:
        masks = _write_foreign(model, written, built.pipeline, pattern)
        if built.tokenizer is not None:
            positions = model.config.max_position_embeddings
            write_tokenizer(written, built.tokenizer, model.config, positions, generation_of(built))
        zeros = _zeros(built.pipeline, masks, dense_weights)
        remarks = _remarks(path, built, type(model).__name__, zeros, dense_weights)
        _write_card(written, out.name, remarks)
    return "\n".join((f"{out}: {remarks[0]}", *remarks[1:]))


def _write_foreign(model: Any, folder: Path, pipeline: Pipeline, pattern: str) -> Masks | None:
    """A plain model, its pattern in config.json, and its masks, which are returned."""
    masks = Masks(*kept_masks(pipeline)) if has_masks(pipeline) else None
    if pattern := masks.pattern if masks is not None else pattern:
        model.config.act24_weight_pattern = pattern
    model.save_pretrained(folder)
    even_modes_(folder)
    if masks is not None:
        check_pruned(model.state_dict(), masks, "what is exported")
        write_masks(folder, masks)
    return masks


def _stock(
    pipeline: Pipeline, config: LlamaConfig, state: dict[str, Tensor]
) -> tuple[str, LlamaConfig, dict[str, Tensor]]:
    """The model as a LLaMA or an Arcee.

    Raises:
        PassError: it is neither, and why.
    """
    if uneven := uneven_heads(config):
        raise PassError(uneven)
    relu2 = [p for p in pipeline.passes if isinstance(p, Relu2FFN)]
    if not relu2:
        return LLAMA, config, pipeline.state_to_stock(state)
    networks = {f"model.layers.{index}.mlp" for index in range(config.num_hidden_layers)}
    if left := sorted(networks - set(pipeline.places(Relu2FFN.name))):
        raise PassError(f"Arcee has relu² in every layer, and {left[0]} has none")
    if any(p.activation != "relu2" for p in relu2):
        raise PassError("Arcee's activation is relu², this model's is relu")
    stock = pipeline.state_to_stock(state, keep=(Relu2FFN.name,))
    widths = {stock[f"{network}.up_proj.weight"].shape[0] for network in networks}
    if len(widths) > 1:
        raise PassError(f"Arcee has one width of networks, and these have {sorted(widths)}")
    return ARCEE, dataclasses.replace(config, intermediate_size=widths.pop()), stock


def _pattern(pipeline: Pipeline) -> str:
    return "2:4" if any(isinstance(p, Weight24) for p in pipeline.active) else ""


def _zeros(pipeline: Pipeline, masks: Masks | None, dense_weights: bool) -> Counter[str]:
    """How many weights have which pattern."""
    if masks is not None:
        return Counter(str(masks.patterns[name]) for name, mask in masks.masks.items() if not mask.all())
    in_force = [] if dense_weights else [p for p in pipeline.active if isinstance(p, Weight24)]
    return Counter({"2:4": sum(len(pipeline.matches(p)) for p in in_force)} if in_force else {})


def _remarks(path: Path, built: Built, kind: str, zeros: Mapping[str, int], dense_weights: bool) -> list[str]:
    """What was written and what its readers compute: the model card, and what the command says. `kind` may be
    the name of another class."""
    classes = {LLAMA: "LlamaForCausalLM", ARCEE: "ArceeForCausalLM", ACT24: "the model type act24"}
    remarks = [f"a Hugging Face checkpoint ({classes.get(kind, kind)}), step {built.step}"]
    if kind == ACT24:
        remarks.append(
            "It computes the function that was trained, where act24 is installed: import "
            "act24.tools.huggingface.model_type, or trust_remote_code=True"
        )
    elif computes_24(built.pipeline):
        kept = "; --as act24 keeps them. " if kind in classes else ", and no form of this class keeps them. "
        told = "It was trained with 2:4 activations, which its readers compute dense"
        remarks.append(told + kept + _cost_of_dense(path))
    if built.recipe is not None and built.recipe.data.attention == "document":
        remarks.append(
            "It was trained with attention within documents: it computes that function for one text a row, "
            "an end-of-text token in front, and who packs texts into a row has to keep them apart there"
        )
    for pattern, count in sorted(zeros.items()):
        keep, _, of = pattern.partition(":")
        groups = f"{pattern}: of every {of} along the inputs {keep} stay, and the others are zero"
        told = groups if of else f"pruned: a share of {pattern} of each is zero"
        remarks.append(f"{count} of its weights are {told}")
    if dense_weights:
        remarks.append("Its weights are the dense masters behind 2:4 ones, not the function that was trained")
    return remarks


def _cost_of_dense(path: Path) -> str:
    """What computing 2:4 activations dense changes in held-out loss, or why that is not known."""
    from act24.tools.run.evaluate import evaluate_checkpoint

    try:
        forms = evaluate_checkpoint(path, [f"eval.tokens={MEASURED_TOKENS}"])
    except Act24Error as error:
        return f"What that changes in held-out loss was not measured: {error}"
    dense, sparse = forms["dense"], forms["2:4"]
    return f"Held-out loss with 2:4 {sparse.loss:.4f}, dense {dense.loss:.4f}, over {dense.tokens:,} tokens"
