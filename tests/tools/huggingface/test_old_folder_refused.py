"""What is said of a folder that run_c4.py did not leave, or whose command says nothing of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import act24
from act24.errors import Act24Error
from act24.tools.huggingface.old_folder import check_old
from act24.tools.run.build import build_from_old
from tests.tools.huggingface.test_old_folder import FLAGS, RANK, case, old_model, write

COMMAND = (
    "torchrun run_c4.py --model_config configs/llama_9m.json --batch_size 4 --dtype float32 --optimizer "
    f"cola_adamw --loro_scope all --loro_attn_rank {RANK} --loro_mlp_rank {RANK}"
)
#: What is wrong with a command.txt, and what is said of that.
WRONG = {
    "a quote that is open": (f"{COMMAND} --name 'a", "it cannot be read: No closing quotation"),
    "another encoding": (f"{COMMAND} --name \xe9".encode("latin-1"), "it cannot be read: .*utf-8"),
    "an option that is none": (f"{COMMAND} --foo 3", "has no option --foo"),
    "a value that is none": (
        COMMAND.replace(f"attn_rank {RANK}", "attn_rank x"),
        "--loro_attn_rank takes a ",
    ),
    "nothing": ("", "run_c4.py needs --batch_size"),
    "a command of act24": ("act24 train demo", "'act24' belongs to no option"),
    "an optimizer that act24 has not": (
        COMMAND.replace("cola_adamw", "sgd"),
        "no optimizer like --optimizer sgd",
    ),
    "what no recipe has": (f"{COMMAND} --num_training_steps 0", "the recipe of this command: train.steps"),
}


@pytest.mark.parametrize(("content", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_command_that_says_nothing_is_named_by_its_file(
    content: str | bytes, said: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model_40", old_model("cola"), None)
    (folder / "command.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Act24Error, match=f"{said}.*; the run_c4.py command that .*, as a line$") as error:
        act24.load(folder)
    assert str(error.value).startswith(f"{folder}/command.txt: ")


@pytest.mark.parametrize("step", ["a", -1, 1.5, None, True])
def test_a_number_of_updates_that_is_none_is_named_by_its_file(step: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "model_40", old_model("cola"), None)
    (folder / "command.txt").write_text(COMMAND)
    (folder / "training_state.json").write_text(json.dumps({"update_step": step}))
    with pytest.raises(
        Act24Error, match="expected the number of updates that were made: mend it, or"
    ) as error:
        act24.load(folder)
    assert str(error.value).startswith(f"{folder}/training_state.json: update_step is {step!r}")


def test_a_command_of_another_model_says_what_to_look_at(tmp_path: Path) -> None:
    folder = write(tmp_path / "model_40", old_model("cola"), None)
    (folder / "command.txt").write_text(COMMAND.replace("--model_config ", "--model_config="))
    assert act24.load(folder).pipeline.passes[0].name == "cola"
    for wrong in (COMMAND.replace("cola", "lost"), COMMAND.replace("scope all", "scope attn")):
        (folder / "command.txt").write_text(wrong)
        with pytest.raises(
            Act24Error, match=r"; are --optimizer, --loro_scope and the ranks in .*command\.txt"
        ):
            act24.load(folder)


def test_what_no_old_run_left_is_no_folder_to_continue_from(tmp_path: Path) -> None:
    """It was said that a pickle could not be read, or a command was to be written into a run of act24."""
    old = write(tmp_path / "runs" / "model_40", old_model("dense"), {**FLAGS, "optimizer": "adamw"})
    check_old(old)
    checkpoint = tmp_path / "own" / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "llama"}')
    on = f"goes on with act24 train {tmp_path}/own/recipe.toml --run-dir {tmp_path}/own --resume auto"
    wrong = {
        "gone": "it is none: name the folder",
        "exported/config.json": "it is none: name the folder",
        "runs": "it holds model_40: name one of them",
        "own": on,
        "own/checkpoints/step-000002": on,
        "exported": f"write the run_c4.py command that trained it into {tmp_path}/exported/command.txt, or",
    }
    for name, said in wrong.items():
        with pytest.raises(Act24Error, match="takes a folder that run_c4") as error:
            check_old(tmp_path / name)
        assert str(error.value).startswith(f"--continue_from {tmp_path / name} takes")
        assert said in str(error.value)


def test_weights_that_begin_as_another_function_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CoLA's weights have LORO's names and shapes."""
    (loro, _), (cola, _) = (case(name, tmp_path / name) for name in ("LORO", "CoLA"))
    recipe = act24.load(loro).recipe
    build_from_old(loro, recipe, torch.device("cpu"))
    assert "another function" not in caplog.text
    build_from_old(cola, recipe, torch.device("cpu"))
    assert (
        "was trained with cola all silu, and this command has low_rank all: its weights begin as"
        in caplog.text
    )
