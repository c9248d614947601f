"""What a recipe may say: one frozen pydantic model a table, unknown keys forbidden.

A recipe is data. Everything here is declared, checked and given a default; nothing is built. Tables that
choose a record by name (`[optimizer]`, `[schedule]`, `[[passes]]`) are objects of the record's own class,
which `act24.recipes.records` makes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, SkipValidation, model_validator

from act24.llama import LlamaConfig
from act24.optim import OptimizerOptions
from act24.options import MOST_STEPS, option_errors
from act24.passes.base import Pass
from act24.recipes.records import as_table
from act24.schedules import Cosine, Schedule

#: What files, devices and random generators count in has 64 bits, and sizes beyond 32 fit nowhere.
Size = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Steps = Annotated[int, Field(ge=0, le=MOST_STEPS)]
PositiveSteps = Annotated[int, Field(gt=0, le=MOST_STEPS)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Documents = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    """A table of a recipe. Unknown keys are errors; numbers are finite and not made of strings."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
    )


class Model(Section):
    """`[model]`: the stock LLaMA, by preset, with single fields overridden where a value is given; or a
    trained model to start from.

    What the fields take is what `LlamaConfig` says of those of the same name.
    """

    preset: str | None = None
    # A run, a checkpoint, a Hugging Face folder or Hub name, a .gguf file: its weights alone.
    pretrained: str | None = None
    config: str | None = None  # JSON, and sha256 of the weights: of `pretrained`, when it was first opened
    sha256: str | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None
    tie_word_embeddings: bool | None = None
    initializer_range: float | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None

    @model_validator(mode="after")
    def _one_beginning(self) -> Model:
        if (self.preset is None) == (self.pretrained is None):
            raise ValueError("needs preset, or else pretrained, a trained model")
        if self.pretrained is not None and (names := [*self.overrides()]):
            raise ValueError(f"{names[0]} cannot be given beside pretrained, which has its own")
        return self

    @model_validator(mode="after")
    def _values_are_those_of_a_llama(self) -> Model:
        for error in option_errors(LlamaConfig, self.overrides()):
            raise error
        return self

    def overrides(self) -> dict[str, Any]:
        """The fields of a LLaMA that are given beside `preset`."""
        other = ("preset", "pretrained", "config", "sha256")
        return {name: value for name, value in self if name not in other and value is not None}


class Tokenizer(Section):
    """`[tokenizer]`: a `tokenizer.json`, a Hub name, or a byte-level BPE trained once on the source."""

    name: str = "bpe"  # "bpe" is trained on the source; a tokenizer.json; a name on the Hub
    vocab_size: Size = 4096  # of the trained BPE; ignored by the others
    end_of_text: str | None = None  # where it is none of the known ones ("<|endoftext|>", "</s>", …)


class Data(Section):
    """`[data]`: where rows of tokens come from (`tools/data`)."""

    source: Literal["hf", "files", "builtin", "shards"] = "hf"  # hf: a data set of the Hub
    dataset: str = "allenai/c4"  # OWNER/NAME on the Hub
    subset: str = "en"  # "" for a data set that has none
    train_split: str = "train"
    heldout_split: str = "validation"
    revision: str | None = None  # of the Hub's data set: a commit, tag or branch; a run pins the commit
    text_field: str = "text"  # of a record
    encoding: str | None = None  # of text files and JSON; not given: UTF-8, or as detected
    on_bad_record: Literal["stop", "skip"] = "stop"  # no JSON, no text field: skip leaves it out, counted
    retry_seconds: NonNegativeFloat = 120.0  # that a stream of the Hub waits for a network; 1e9: for ever
    train_files: tuple[str, ...] = ()  # globs
    heldout_files: tuple[str, ...] = ()  # globs; not given: a part of the training files is held out
    shards: str | None = None  # folder written by `act24 data prepare`
    rows: Literal["packed", "padded"] = "packed"  # padded: one document a row
    attention: Literal["causal", "document"] = "causal"  # document: not across those of a packed row
    max_length: Size = 256  # tokens a row
    shuffle_seed: Seed = 42
    shuffle_buffer: Annotated[int, Field(ge=0, lt=2**31)] = (
        0  # documents of text that are shuffled among each other; 0: none
    )

    @model_validator(mode="after")
    def _source_has_its_keys(self) -> Data:
        if self.source == "files" and not self.train_files:
            raise ValueError('source = "files" needs data.train_files, a list of globs')
        if self.source == "shards" and not self.shards:
            raise ValueError('source = "shards" needs data.shards, a folder written by `act24 data prepare`')
        if self.rows == "padded" and self.max_length == 1:
            raise ValueError('rows = "padded" needs max_length of 2 or more: of one token none is predicted')
        return self


class Train(Section):
    """`[train]`: how long, how much at once, in which precision."""

    steps: PositiveSteps  # optimizer steps
    batch_size: Size  # rows a process and micro-batch
    total_batch_size: Size  # rows an optimizer step, over all processes
    dtype: Literal["float32", "bfloat16", "bfloat16_autocast"] = "bfloat16_autocast"  # or of weights too
    seed: Seed = 0
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0 switches clipping off
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA
    cuda_graphs: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU, where a micro-batch can be captured
    parallel: Literal["ddp", "fsdp"] = "ddp"  # only with more than one process
    activation_checkpointing: bool = False  # keep a block's input alone, and compute it again
    # Of a loss or gradient: end the run, or leave the batch out. To skip, the host waits for each step.
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite
    max_skips: Size = 10  # batches left out in a row, after which the run ends all the same


class Evaluation(Section):
    """`[eval]`: the held-out measure, the same rows each time."""

    every: Steps = 1000  # optimizer steps; 0: only at the end
    tokens: Annotated[int, Field(gt=0, lt=2**63)] = (
        10_000_000  # predicted tokens, as a target: whole rows until it is reached
    )
    batch_size: Size | None = None  # rows; None: train.batch_size
    max_seconds: Annotated[float, Field(gt=0)] | None = None  # then it ends early, and says so; None: never


class Checkpoint(Section):
    """`[checkpoint]`."""

    every: Steps = 1000  # optimizer steps; 0: only at the end
    keep: Size = 2  # the newest that stay
    keep_every: Steps = 0  # those after every so many optimizer steps stay too; 0: none
    keep_best: Steps = 0  # so many of least held-out loss stay too, of those evaluated on the same rows


class Log(Section):
    """`[log]`: terminal and TensorBoard."""

    every: PositiveSteps = 10  # optimizer steps
    wandb: bool = False  # to Weights & Biases too, what TensorBoard gets; needs the package wandb
    activation_statistics: bool = True  # zeros after relu², and what 2:4 drops, by layer
    activation_statistics_every: PositiveSteps = 1  # optimizer steps; those in between count nothing
    weight_sparsity_every: Steps = 1000  # optimizer steps; 0: never
    gradient_cosine_every: Steps = 0  # optimizer steps; 2:4 against exact weight gradients; 0: never


class Recipe(Section):
    """A whole recipe, resolved: no `extends` left, every default filled in."""

    description: str = ""
    strict: bool = False  # a pass that reaches less of the model than its scope promises is an error
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    train: Train
    optimizer: Annotated[OptimizerOptions, SkipValidation, PlainSerializer(as_table)]
    schedule: Annotated[Schedule, SkipValidation, PlainSerializer(as_table)] = Cosine()
    eval: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    passes: SkipValidation[tuple[Pass, ...]] = ()

    @model_validator(mode="after")
    def _batches_divide(self) -> Recipe:
        if self.train.total_batch_size % self.train.batch_size:
            raise ValueError(
                f"train.total_batch_size ({self.train.total_batch_size}) must be a multiple of "
                f"train.batch_size ({self.train.batch_size})"
            )
        return self

    def lr_multiplier(self, step: int, total_steps: int | None = None) -> float:
        """The factor on `optimizer.lr` at update `step`, counted from 0.

        Args:
            total_steps: what the schedule is computed for, default `train.steps`. Behind them its last value
                stays.
        """
        total_steps = total_steps or self.train.steps
        return self.schedule.multiplier(min(step, total_steps - 1), total_steps) * self.optimizer.softened(
            step
        )
