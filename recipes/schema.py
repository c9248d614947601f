"""What a recipe may say: one frozen pydantic model a table, unknown keys forbidden.

A recipe is data. Everything here is declared, checked and given a default; nothing is built.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, model_validator

from act24 import schedules
from act24.passes.base import Pass

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A table of a recipe. Unknown keys are errors; numbers are not made of strings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), arbitrary_types_allowed=True
    )


class Model(Section):
    """`[model]`: the stock LLaMA, by preset, with single fields overridden where a value is given."""

    preset: str
    vocab_size: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_key_value_heads: PositiveInt | None = None
    rope_theta: PositiveFloat | None = None
    tie_word_embeddings: bool | None = None
    initializer_range: PositiveFloat | None = None

    def overrides(self) -> dict[str, Any]:
        """The fields given beside `preset`."""
        return {name: value for name, value in self if name != "preset" and value is not None}


class Tokenizer(Section):
    """`[tokenizer]`: a `tokenizer.json`, a Hub name, or a byte-level BPE trained once on the source."""

    name: str = "bpe"
    vocab_size: PositiveInt = 4096  # of the trained BPE; ignored by the others


class Data(Section):
    """`[data]`: where rows of tokens come from (`tools/data`)."""

    source: Literal["hf", "files", "builtin", "shards"] = "hf"
    dataset: str = "allenai/c4"
    subset: str = "en"  # "" for a data set that has none
    train_split: str = "train"
    heldout_split: str = "validation"
    revision: str | None = None  # of the Hub's data set: a commit, tag or branch; a run pins the commit
    text_field: str = "text"
    encoding: str | None = None  # of text files and JSON; not given: UTF-8, or as detected
    on_bad_record: Literal["stop", "skip"] = "stop"  # no JSON, no text field: skip leaves it out, counted
    retry_seconds: NonNegativeFloat = (
        120.0  # that a stream of the Hub waits for a network; inf: till it is back
    )
    train_files: tuple[str, ...] = ()
    heldout_files: tuple[str, ...] = ()
    shards: str | None = None  # folder written by `act24 data prepare`
    rows: Literal["packed", "padded"] = "packed"
    max_length: PositiveInt = 256  # tokens a row
    shuffle_seed: NonNegativeInt = 42

    @model_validator(mode="after")
    def _source_has_its_keys(self) -> Data:
        if self.source == "files" and not self.train_files:
            raise ValueError('source = "files" needs data.train_files, a list of globs')
        if self.source == "shards" and not self.shards:
            raise ValueError('source = "shards" needs data.shards, a folder written by `act24 data prepare`')
        return self


class Train(Section):
    """`[train]`: how long, how much at once, in which precision."""

    steps: PositiveInt
    batch_size: PositiveInt  # rows a process and micro-batch
    total_batch_size: PositiveInt  # rows an optimizer step, over all processes
    dtype: Literal["float32", "bfloat16", "bfloat16_autocast"] = "bfloat16_autocast"
    seed: NonNegativeInt = 0
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0 switches clipping off
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA
    parallel: Literal["ddp", "fsdp"] = "ddp"  # only with more than one process
    activation_checkpointing: bool = False
    # Of a loss or gradient: end the run, or leave the batch out. To skip, the host waits for each step.
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: PositiveInt = 10  # batches left out in a row, after which the run ends all the same


#: What `[optimizer]` has where the recipe says nothing, by name.
_OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "loro_adamw": {
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "type": "loro",
        "lr_scaler": -1.0,
        "exact_every": 500,
        "exact_lr_scale": 1.0,
        "refresh": "all",
        "restarts": 0,
    },
    "cola_adamw": {"betas": (0.9, 0.999), "weight_decay": 0.01, "decay": "all"},
    "lost_adamw": {"betas": (0.9, 0.95)},
}
_OPTIMIZER_ALIASES = {"adamw_cola": "cola_adamw", "adamw_lost": "lost_adamw"}
_LORO_KEYS = ("type", "lr_scaler", "exact_every", "exact_lr_scale", "refresh", "refresh_every", "restarts")


class Optimizer(Section):
    """`[optimizer]`. `cola_adamw` and `lost_adamw` are AdamW with the settings of the method.

    The keys from `type` on are those of `loro_adamw` (`act24.optim.LOROAdamW`) and of no other.
    """

    name: Literal["adamw", "loro_adamw", "cola_adamw", "lost_adamw"] = "adamw"
    lr: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    decay: Literal["matrices", "all"] = "matrices"  # what weight decay acts on
    state_dtype: Literal["float32", "parameter"] = "float32"
    momentum_reset_steps: NonNegativeInt = 0  # zero the moments after every so many updates; 0: never
    momentum_reset_warmup: NonNegativeInt = 0  # updates over which the learning rate climbs after that
    type: Literal["loro", "eucl", "loro_raw"] | None = None
    lr_scaler: float | None = None  # on the factors' learning rate in lazy updates; -1: rank / hidden_size
    exact_every: NonNegativeInt | None = None  # updates from one exact one to the next; 0: none
    exact_lr_scale: PositiveFloat | None = None
    refresh: Literal["all", "reg", "lrk", "none"] | None = None  # moments zeroed: factors are lrk, others reg
    refresh_every: NonNegativeInt | None = None  # updates; not given: after each exact one
    restarts: NonNegativeInt | None = (
        None  # updates from one refactoring of the products to the next; 0: never
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_name(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name: Any = given.get("name", "adamw")
        name = _OPTIMIZER_ALIASES.get(name, name)
        return {**_OPTIMIZER_DEFAULTS.get(name, {}), **given, "name": name}

    @model_validator(mode="after")
    def _keys_fit_the_name(self) -> Optimizer:
        if self.name != "loro_adamw":
            for key in _LORO_KEYS:
                if getattr(self, key) is not None:
                    raise ValueError(f'{key} belongs to name = "loro_adamw", not to "{self.name}"')
        if self.momentum_reset_warmup and not self.momentum_reset_steps:
            raise ValueError("momentum_reset_warmup has no meaning without momentum_reset_steps")
        if self.momentum_reset_steps and self.momentum_reset_warmup >= self.momentum_reset_steps:
            raise ValueError(
                f"momentum_reset_warmup ({self.momentum_reset_warmup}) must be below momentum_reset_steps "
                f"({self.momentum_reset_steps})"
            )
        return self

    def loro_options(self) -> dict[str, Any]:
        """The keys that are `loro_adamw`'s, as `act24.optim.LOROAdamW` takes them."""
        return {key: getattr(self, key) for key in _LORO_KEYS if key != "lr_scaler"}


_RESTART_KEYS = ("restart_every", "restart_warmup_steps", "lr_adjust_steps", "restart_in_warmup")


class Schedule(Section):
    """`[schedule]`: the learning-rate multiplier over optimizer steps (`act24.schedules`).

    The keys from `restart_every` on are those of `cosine_restart` and of no other.
    """

    name: Literal["cosine", "linear", "constant", "cosine_restart"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1  # constant has none
    restart_every: PositiveInt | None = None
    restart_warmup_steps: NonNegativeInt | None = None  # not given: 5
    lr_adjust_steps: int | None = None  # 0 or negative: delay of the cosine
    restart_in_warmup: bool | None = None  # not given: true

    @model_validator(mode="after")
    def _keys_fit_the_name(self) -> Schedule:
        if self.name == "cosine_restart":
            if self.restart_every is None:
                raise ValueError('name = "cosine_restart" needs restart_every')
            return self
        for key in _RESTART_KEYS:
            if getattr(self, key) is not None:
                raise ValueError(f'{key} belongs to name = "cosine_restart", not to "{self.name}"')
        return self

    def arguments(self, total_steps: int) -> dict[str, Any]:
        """What the schedule's function is called with, beside the step."""
        if self.name == "constant":
            return {"warmup_steps": self.warmup_steps}
        given = {key: getattr(self, key) for key in _RESTART_KEYS if getattr(self, key) is not None}
        return {
            "total_steps": total_steps,
            "warmup_steps": self.warmup_steps,
            "min_lr_ratio": self.min_lr_ratio,
            **given,
        }


class Evaluation(Section):
    """`[eval]`: the held-out measure, the same rows each time."""

    every: NonNegativeInt = 1000  # optimizer steps; 0: only at the end
    tokens: PositiveInt = 10_000_000  # predicted tokens, as a target: whole rows until it is reached
    batch_size: PositiveInt | None = None  # rows; None: train.batch_size


class Checkpoint(Section):
    """`[checkpoint]`."""

    every: NonNegativeInt = 1000  # optimizer steps; 0: only at the end
    keep: PositiveInt = 2  # the newest that stay
    keep_every: NonNegativeInt = 0  # those after every so many optimizer steps stay too; 0: none
    keep_best: NonNegativeInt = (
        0  # so many of least held-out loss stay too, among those evaluated at their step
    )


class Log(Section):
    """`[log]`: terminal and TensorBoard."""

    every: PositiveInt = 10  # optimizer steps
    activation_statistics: bool = True  # zeros after relu², and what 2:4 drops, by layer
    weight_sparsity_every: NonNegativeInt = 1000  # optimizer steps; 0: never
    gradient_cosine_every: NonNegativeInt = 0  # optimizer steps; 2:4 against exact weight gradients; 0: never


class Recipe(Section):
    """A whole recipe, resolved: no `extends` left, every default filled in."""

    description: str = ""
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    train: Train
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    eval: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    passes: SkipValidation[tuple[Pass, ...]] = ()  # built and checked by the loader, against the registry

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
        softened = schedules.rewarm(
            step,
            every=self.optimizer.momentum_reset_steps,
            warmup_steps=self.optimizer.momentum_reset_warmup,
        )
        schedule = schedules.SCHEDULES[self.schedule.name]
        return schedule(min(step, total_steps - 1), **self.schedule.arguments(total_steps)) * softened
