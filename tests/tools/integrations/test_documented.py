"""The lines that the documents have for other people's loops run, and train as a plain loop does."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import act24
from act24.passes import Activation24, Pipeline, Relu2FFN, SparseMask, Weight24


def blocks(path: str) -> list[str]:
    text = (Path(__file__).parents[3] / path).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.S)


*_, TRAINER, ACCELERATE, LIGHTNING = blocks("docs/own-training-loop.md")
ROWS = torch.randint(97, (12, 16), generator=torch.Generator().manual_seed(0))


def rewritten() -> tuple[Any, Pipeline]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2))
    passes = [
        Relu2FFN(),
        Weight24(scope="attn", decay=0.1, mask_every=2),
        Activation24(method="soft_dynamic"),
    ]
    return model, act24.apply_(model, passes)


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part, "labels": part} for part in ROWS.split(2)]


def plain_loop() -> dict[str, torch.Tensor]:
    """Three updates of two micro-batches."""
    model, pipeline = rewritten()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, (first, second) in enumerate(zip(batches()[::2], batches()[1::2], strict=True)):
        pipeline.begin_update_(step, first)
        for batch in (first, second):
            (model(**batch).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def assert_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_readme() -> None:
    pytest.importorskip("transformers")
    (block,) = blocks("README.md")
    exec(block, {})


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, pipeline = rewritten()
    names = {
        "accelerator": accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": torch.utils.data.DataLoader(batches(), batch_size=None),  # type: ignore[arg-type]
        "pipeline": pipeline,
    }
    exec(ACCELERATE, names)
    assert_same(model.state_dict(), plain_loop())


def test_a_lightning_module() -> None:
    """Its loop, as Lightning runs it: the hook before each batch, a step at every second."""
    model, pipeline = rewritten()
    names: dict[str, Any] = {}
    exec(LIGHTNING, names)
    module = SimpleNamespace(
        trainer=SimpleNamespace(
            accumulate_grad_batches=2, strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
        ),
        pipeline=pipeline,
        global_step=0,
        global_rank=0,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(batches()):
        names["on_train_batch_start"](module, batch, index)
        (model(**batch).loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
            module.global_step += 1
    assert_same(model.state_dict(), plain_loop())


@pytest.mark.slow
def test_lightning_itself(tmp_path) -> None:
    lightning = pytest.importorskip("lightning")
    given, its = rewritten()
    names: dict[str, Any] = {}
    exec(LIGHTNING, names)

    class Module(lightning.LightningModule):
        model, pipeline = given, its
        on_train_batch_start = names["on_train_batch_start"]

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(given.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, logger=False, barebones=True
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == 3
    assert_same(given.state_dict(), plain_loop())


def test_the_trainer_saves_what_it_goes_on_from_and_nothing_that_opens_as_another_function(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, pipeline = rewritten()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    names = {"act24": act24, "transformers": transformers, "model": model, "pipeline": pipeline}
    names |= {"arguments": arguments, "rows": rows}
    exec(TRAINER, names)
    names["trainer"].train()
    saved = tmp_path / "checkpoint-2"
    assert (saved / "model.safetensors").is_file()
    assert not (saved / "config.json").exists()
    with pytest.raises(act24.Act24Error, match=r"act24\.save_pretrained"):
        names["trainer"].save_model(str(tmp_path / "last"))
    losses = names["trainer"].evaluate(rows)
    with pipeline.evaluation(), torch.no_grad():
        expected = torch.stack([model(**batch).loss for batch in batches()]).mean()
    assert losses["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


def trainer_of(folder: Path, steps: int, with_callback: bool = True) -> tuple[Any, Pipeline]:
    """The Trainer of `transformers` on a rewritten LLaMA of its own, with AdamW and a falling rate."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, pipeline = rewritten()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    callbacks = [act24.integrations.TrainerCallback(pipeline)] if with_callback else []
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks), pipeline


def test_the_trainer_goes_on_from_its_own_checkpoint(tmp_path) -> None:
    """Masks are renewed every 2nd update and scales are kept: both are in the checkpoint, or made anew."""
    straight, _ = trainer_of(tmp_path / "straight", 5)
    straight.train()
    trainer_of(tmp_path / "halves", 2)[0].train()
    resumed, pipeline = trainer_of(tmp_path / "halves", 5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert (tmp_path / "halves" / "checkpoint-4").is_dir()
    assert_same(resumed.model.state_dict(), straight.model.state_dict())
    act24.save_pretrained(pipeline, tmp_path / "out")
    with pipeline.evaluation(), torch.no_grad():
        expected = resumed.model(ROWS).logits
    torch.testing.assert_close(act24.load(tmp_path / "out").model(ROWS), expected, atol=2e-6, rtol=1e-4)


def test_the_trainer_keeps_the_zeros_of_a_pruned_model(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2))
    before = {}
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            parameter.data[:, ::2] = 0
            before[name] = parameter.detach().clone()
    pipeline = act24.apply_(model, [SparseMask(masks="zeros")])
    optimizer = torch.optim.Muon([model.get_parameter(name) for name in before], lr=1e-2)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ROWS],
        callbacks=[act24.integrations.TrainerCallback(pipeline)],
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    for name, value in before.items():
        weight = model.get_parameter(name)
        assert (weight[:, ::2] == 0).all()
        assert not torch.equal(weight, value)


def test_the_trainer_without_the_callback_is_refused(tmp_path) -> None:
    trainer, pipeline = trainer_of(tmp_path, 2, with_callback=False)
    with pytest.raises(act24.Act24Error, match="begin_update_"):
        trainer.train()
    with pytest.raises(act24.Act24Error, match=r"act24\.integrations\.TrainerCallback\(pipeline\)"):
        pipeline.model.save_pretrained(tmp_path / "folder")
