"""Every pass × every way out of a training run, at steps before, in and after its range: the logits are those
of the run's own evaluation, or differ by what the form says that it leaves out."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny as tiny_recipe
import torch
from slow import slow_but
from torch import Tensor

from act24.errors import Act24Error
from act24.inference.sampling import Sampling
from act24.passes import (
    REGISTRY,
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    Lora,
    Lost,
    LowRank,
    MaskedLora,
    OperationalPass,
    Pass,
    Recompute,
    Relu2FFN,
    SparseMask,
    Weight24,
)
from act24.recipes.load import load_recipe, recipe_names
from act24.sparse24.feed_forward.methods import METHODS as ACTIVATION_METHODS
from act24.sparse24.weight.methods import METHODS as WEIGHT_METHODS
from act24.tools.commands.generate import Request, sample_text
from act24.tools.data import open_tokenizer
from act24.tools.huggingface.export import FORMS, export_run, save_pretrained
from act24.tools.run import pretrained
from act24.tools.run import train as training
from act24.tools.run.build import Built, build, load
from act24.tools.run.evaluate import evaluate_checkpoint

IDS = torch.arange(24).reshape(2, 12)
RANKS = {"attn_rank": 8, "mlp_rank": 8}
#: A model of one update is before it, of 2 at its beginning, of 3 in it, of 4 at its end, of 5 behind it.
RANGE = {"from_step": 2, "until_step": 4}
STEPS = (1, 2, 3, 4, 5)
PROMPT = "two of four"

MATRIX: dict[str, tuple[Pass, ...]] = {
    "dense": (),
    "relu2_ffn": (Relu2FFN(),),
    "relu": (Relu2FFN(activation="relu"),),
    "low_rank": (LowRank(**RANKS),),
    "cola": (Cola(**RANKS),),
    "lost": (Lost(**RANKS),),
    "recompute": (Cola(**RANKS), Recompute()),
    "activation_statistics": (Relu2FFN(), ActivationStatistics()),
    "fp8": (Fp8(**RANGE),),
    "relu2-activation24-fp8": (Relu2FFN(), Activation24(method="soft_dynamic", **RANGE), Fp8(**RANGE)),
    "sparse_mask": (SparseMask(masks="zeros"),),
    "lora": (Lora(dropout=0.3),),
    "masked_lora": (MaskedLora(),),
    "relu2-sparse_mask-activation24": (Relu2FFN(), SparseMask(masks="zeros"), Activation24(**RANGE)),
    "relu2-low_rank": (Relu2FFN(), LowRank(**RANKS)),
    "relu2-low_rank-activation24": (Relu2FFN(), LowRank(**RANKS), Activation24(**RANGE)),
    "relu2-cola-activation24": (Relu2FFN(), Cola(**RANKS, bottleneck="relu2"), Activation24(**RANGE)),
    "relu2-cola-activation24-recompute": (
        Relu2FFN(),
        Cola(**RANKS),  # recompute keeps bottlenecks that no operation hides
        Activation24(method="mvue", **RANGE),
        Recompute(),
    ),
    "relu2-lost-activation24": (Relu2FFN(), Lost(**RANKS), Activation24(**RANGE)),
    "relu2-weight24": (Relu2FFN(), Weight24(mask_every=2, **RANGE)),
    "relu2-weight24-activation24": (
        Relu2FFN(),
        Weight24(scope="attn", **RANGE),
        Activation24(method="soft_dynamic", from_step=2),
    ),
    "relu2-activation24-weight24": (  # activations keep their linears
        Relu2FFN(),
        Activation24(method="soft_dynamic", from_step=1),
        Weight24(method="soft_threshold", **RANGE),
    ),
    "relu2-activation24-weight24-taken": (  # and leave them to weights from step 3 on
        Relu2FFN(),
        Activation24(method="soft_threshold_weights", from_step=1, until_step=3),
        Weight24(method="soft_threshold", from_step=2),
    ),
    **{
        f"activation24-{name}": (Relu2FFN(), Activation24(method=name, backward="split_gemm", **RANGE))
        for name in ACTIVATION_METHODS
    },
    **{f"weight24-{name}": (Weight24(method=name, **RANGE),) for name in WEIGHT_METHODS},
}
#: What runs in the fast suite; the rest is slow.
FAST = ("weight24-transposable",)

#: Ways out that are no cell here, and why.
ELSEWHERE = {
    "own loop": "a way to train and not to read: every pass in tests/tools/integrations/test_loops.py",
    "Trainer": "the same, there",
    "export --as gguf": "what llama and arcee hold, for llama.cpp: tests/tools/huggingface/test_llama_cpp.py",
    "export --as peft": "an adapter, beside what the run began with: tests/tools/pruning/test_recovery.py",
    "transformers' save_pretrained": "the stock LLaMA has none: tests/tools/huggingface/test_export.py",
}


@dataclass(frozen=True)
class Seen:
    """A run's own evaluation after an update.

    Attributes:
        logits, dense: of IDS, and without 2:4 activations.
        text: PROMPT and what it most likely is followed by, to the end of the text.
        loss: on the held-out rows.
    """

    logits: Tensor
    dense: Tensor
    text: str
    loss: float


@dataclass(frozen=True)
class Trained:
    folder: Path
    seen: dict[int, Seen]

    def at(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"


@pytest.fixture(scope="module")
def trained(tiny_file, tmp_path_factory):
    """A run of every entry of MATRIX with what its evaluations saw, made when it is first asked for."""
    made: dict[str, Trained] = {}

    def run(name: str) -> Trained:
        if name not in made:
            folder = tmp_path_factory.mktemp("runs") / name
            made[name] = Trained(folder, follow(tiny_recipe.load_tiny(tiny_file, *OVERRIDES), name, folder))
        return made[name]

    return run


OVERRIDES = (
    "train.steps=5",
    "eval.every=1",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "data.max_length=16",
    "optimizer.lr=2e-2",
    "schedule.warmup_steps=0",
)


def follow(recipe: Any, name: str, folder: Path) -> dict[int, Seen]:
    """Train, and look at the model within each evaluation."""
    seen: dict[int, Seen] = {}
    evaluate = training.evaluate

    def watched(model: Any, rows: Any, *arguments: Any, **options: Any) -> Any:
        evaluation = evaluate(model, rows, *arguments, **options)
        pipeline, lm, step = arguments[2], model.model, options["step"]
        before = {n: t.clone() for n, t in lm.state_dict().items()}
        lm.eval()
        with torch.no_grad():
            with pipeline.evaluation(step=step):
                logits = lm(IDS)
                tokenizer = tokenizer_of(recipe)
                told = [int(token) for token in tokenizer.encode(PROMPT)]
                for _ in range(6):
                    likeliest = int(lm(torch.tensor([told]))[0, -1].argmax())
                    if likeliest == tokenizer.eos_id:
                        break
                    told.append(likeliest)
            in_2_4 = [p.name for p in pipeline.passes if p.name == "activation24"]
            with pipeline.evaluation(in_2_4, step=step):
                dense = lm(IDS)
        lm.train()
        assert all(torch.equal(t, before[n]) for n, t in lm.state_dict().items()), "evaluation moves no state"
        text = tokenizer.decode(told)
        seen[step] = Seen(logits, dense, text, evaluation.loss)
        return evaluation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", watched)
        # Adapters on a model that starts fresh are refused; what the weights are is nothing here.
        patch.setattr(pretrained, "_refuse_untrained", lambda recipe: None)
        assert training.train(recipe.model_copy(update={"passes": MATRIX[name]}), folder).finished
    assert sorted(seen) == [*STEPS]
    return seen


def tokenizer_of(recipe: Any) -> Any:
    return open_tokenizer(recipe.data, recipe.tokenizer)


def opened(folder: Path, tmp: Path) -> Tensor:
    return load(folder).model(IDS)


def by_state_dict(folder: Path, tmp: Path) -> Tensor:
    built = load(folder)
    assert built.recipe is not None
    other = build(built.recipe, torch.device("cpu"), built.step)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    other.model.load_state_dict(built.model.state_dict())
    return other.model.eval()(IDS)


def exported(form: str, folder: Path, tmp: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    from act24.tools.huggingface import model_type  # noqa: F401  (registers it)

    export_run(folder, tmp / "out", form)
    theirs = AutoModelForCausalLM.from_pretrained(tmp / "out").eval()(IDS).logits
    torch.testing.assert_close(load(tmp / "out").model(IDS), theirs, atol=2e-6, rtol=1e-5)
    return theirs


def written_by_us(folder: Path, tmp: Path) -> Tensor:
    save_pretrained(load(folder).pipeline, tmp / "out")
    return load(tmp / "out").model(IDS)


def _renews(built: Built) -> bool:
    return any(p.renews for p in built.pipeline.passes if isinstance(p, OperationalPass))


def copied(how: Callable[[Any], Any], folder: Path, tmp: Path) -> Tensor:
    """Within an evaluation it is the served function; else it says that it is not, if it might be another."""
    built = load(folder)
    renews = _renews(built)
    if renews:
        with pytest.raises(Act24Error, match=r"with pipeline\.evaluation\(\)"):
            how(built.model)(IDS)
    with built.pipeline.evaluation():
        duplicate = how(built.model)
    del built
    if renews:
        with torch.enable_grad(), pytest.raises(Act24Error, match="load_state_dict"):
            duplicate.train()(IDS)
    return duplicate.eval()(IDS)


def pickled(model: Any) -> Any:
    """Tensors of e4m3, also empty ones, are not read by `pickle` alone in torch 2.13: `torch.save`
    has to write them."""
    if not any(b.dtype == torch.float8_e4m3fn for b in model.buffers()):
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Path, Path], Tensor]] = {
    "act24.load": opened,
    "state dict": by_state_dict,
    "export": functools.partial(exported, "auto"),
    "export --as act24": functools.partial(exported, "act24"),
    "act24.save_pretrained": written_by_us,
    "deepcopy": functools.partial(copied, copy.deepcopy),
    "pickle": functools.partial(copied, pickled),
}


def cells(names: Any) -> list[Any]:
    return [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in names]


def test_the_matrix_has_every_pass_and_every_combination_of_a_shipped_recipe() -> None:
    used = {type(p).name for passes in MATRIX.values() for p in passes}
    assert used == {*REGISTRY}
    rows = {frozenset(p.name for p in passes) for passes in MATRIX.values()}
    for recipe in recipe_names():
        assert frozenset(p.name for p in load_recipe(recipe).passes) in rows, recipe
    assert {*FAST} <= {*MATRIX}
    assert all(ELSEWHERE.values())
    held = ("auto", "llama", "arcee")  # "auto" is the first of these two, or act24
    assert {*FORMS} - {*held} == {w.removeprefix("export --as ") for w in (*WAYS, *ELSEWHERE) if "--as" in w}


@pytest.mark.parametrize("way", slow_but(("act24.load", "export", "deepcopy"), WAYS))
@pytest.mark.parametrize("name", cells(MATRIX))
def test_it_is_the_function_that_the_run_evaluates(name, way, trained, tmp_path) -> None:
    run = trained(name)
    for step in STEPS if name not in FAST or way == "act24.load" else (2, 3, 5):
        (tmp_path / str(step)).mkdir()
        with torch.no_grad():
            logits = WAYS[way](run.at(step), tmp_path / str(step))
        seen = run.seen[step]
        left_out = way == "export" and _stock_form(tmp_path / str(step) / "out")
        torch.testing.assert_close(logits, seen.dense if left_out else seen.logits, atol=2e-6, rtol=1e-5)


def _stock_form(folder: Path) -> bool:
    """Whether a folder's readers compute 2:4 activations dense, as its card says."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return "compute dense" in card


@pytest.mark.parametrize("name", cells(MATRIX))
def test_eval_measures_and_sample_continues_as_the_run_does(name, trained) -> None:
    run = trained(name)
    sparse = [p for p in MATRIX[name] if isinstance(p, Activation24 | Weight24)]
    for step in STEPS:
        forms = evaluate_checkpoint(run.at(step))
        active = any(p.active(step) for p in sparse)
        assert forms["2:4" if active else "dense"].loss == pytest.approx(run.seen[step].loss, rel=1e-5)
        coming = any(p.from_step > step for p in sparse)
        assert ("2:4" in forms) == (active or coming), (
            "after the last sparse update there is the dense form only"
        )
        for seed in (0, 1):
            assert (
                sample_text(run.at(step), PROMPT, Request(6, Sampling(0.0), seed=seed)) == run.seen[step].text
            )


@pytest.mark.parametrize(
    "name", cells(["weight24-transposable", "weight24-soft_threshold", "weight24-sr_ste"])
)
def test_before_its_range_2_4_weights_are_those_of_the_weights_at_hand(name, trained) -> None:
    """By hand: every linear of a block with its weight made 2:4 by the method's formula."""
    from act24.sparse24.pattern.soft_threshold import soft_threshold24
    from act24.sparse24.weight.methods import weight_mask, weight_scale

    folder = trained(name).at(1)
    built, forms = load(folder), evaluate_checkpoint(folder)
    (p,) = MATRIX[name]
    with torch.no_grad():
        for parameter_name, weight in built.model.named_parameters():
            if "layers" in parameter_name and weight.ndim == 2:
                soft = p.method == "soft_threshold"
                dense = weight.clone()
                sparse = (
                    soft_threshold24(dense) * weight_scale(dense)
                    if soft
                    else dense * weight_mask(dense, p.method)
                )
                weight.copy_(sparse)
    assert not built.pipeline.active
    by_hand = _heldout_loss(built)
    assert forms["2:4"].loss == pytest.approx(by_hand, rel=1e-5)
    assert forms["2:4"].loss != forms["dense"].loss


def _heldout_loss(built: Built) -> float:
    import torch.nn.functional as F

    from act24.tools.data import heldout_rows

    recipe = built.recipe
    where = {"vocab_size": 300, "rank": 0, "world_size": 1}
    total = count = 0.0
    with torch.no_grad():
        for batch in heldout_rows(recipe.data, built.tokenizer, recipe.eval.tokens, **where).batches(4):
            logits = built.model(batch.input_ids).flatten(0, 1)
            total += float(
                F.cross_entropy(logits, batch.labels.flatten(), reduction="sum", ignore_index=-100)
            )
            count += int((batch.labels >= 0).sum())
    return total / count
