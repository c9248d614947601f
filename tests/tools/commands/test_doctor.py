"""What `act24 doctor` says on a machine without a GPU, and of one whose library is played."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from act24.sparse24.feed_forward.methods import BACKWARDS, ESTIMATORS, METHODS
from act24.sparse24.format import device
from act24.sparse24.kernels.shared import self_check
from act24.sparse24.kernels.shared.self_check import PROVEN
from act24.tools.commands import doctor


def test_on_a_cpu_every_path_is_plain_pytorch_and_says_why() -> None:
    findings = {f.subject: f.finding for f in doctor.examine(torch.device("cpu"))}
    assert findings["PyTorch"] == torch.__version__
    assert findings["GPU"].startswith("none")
    auto = [subject for subject in findings if subject.endswith(', precision = "auto"')]
    predicted = {subject.partition(",")[0]: findings.pop(subject).partition(" by")[0] for subject in auto}
    # At 60m and 130m casts of D×D take what products gain, and at 60m those of the network.
    assert predicted == {
        "llama-60m": "attention bfloat16, network bfloat16",
        "llama-130m": "attention bfloat16, network fp8",
        **dict.fromkeys(("llama-350m", "llama-1b", "llama-7b"), "attention fp8, network fp8"),
    }
    paths = [finding for subject, finding in findings.items() if subject.startswith("llama-")]
    assert len(paths) == 25
    assert all("plain PyTorch" in path and "CUDA" in path for path in paths)
    assert not any("do not know" in path or "multiples of" in path for path in paths), "beside the point"


def test_text_has_a_line_for_every_finding() -> None:
    assert len(doctor.doctor().splitlines()) == len(doctor.examine())


def test_what_recipes_can_name_is_listed() -> None:
    findings = {f.subject: f.finding for f in doctor.examine(torch.device("cpu"))}
    assert findings["optimizers of recipes"] == "adamw, loro_adamw, cola_adamw, lost_adamw, muon"
    assert findings["schedules of recipes"] == "cosine, linear, constant, wsd, cosine_restart"
    assert findings["methods of weight24"] == "transposable, soft_threshold, ste, sr_ste"
    assert findings["methods of prune"].startswith("magnitude, wanda, ")
    assert findings["passes of recipes"].startswith("relu2_ffn, low_rank, cola, lost, ")


def test_paths_of_a_capable_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide networks are packed, narrow ones have 2:4 inside their products, lone activations around none."""
    monkeypatch.setattr(device, "obstacle", lambda _: "")
    monkeypatch.setattr(self_check, "kernel_obstacle", lambda *_: "")
    findings = {f.subject: f.finding for f in doctor.examine(torch.device("cpu"))}
    assert findings["llama-1b, full rank, 2048×8192"].startswith("packed 2:4 products")
    assert findings["llama-7b, rank 1024, 1024×16512"].startswith("packed 2:4 products")
    assert findings["llama-350m, rank 256, 256×4096"].startswith("2:4 inside dense products")
    assert findings["llama-130m, LoST, F 3072"].startswith("2:4 by kernels")
    weights = {k: said for k, said in findings.items() if "2:4 weights" in k}
    assert weights["llama-7b, 2:4 weights, MLP, 4096→11008"] == "2:4 products: y, grad_x, grad_weight"
    assert "multiples of 64" in weights["llama-350m, 2:4 weights, MLP, 1024→2736"]


def test_every_method_estimator_and_backward_is_shown() -> None:
    findings = {f.subject: f.finding for f in doctor.examine(torch.device("cpu"))}
    for kind, table in (("method", METHODS), ("estimator", ESTIMATORS), ("backward", BACKWARDS)):
        for record in table.values():
            assert findings[f"{kind} {record.name}"].startswith(record.summary)


@pytest.mark.parametrize(
    ("name", "said"), [("NVIDIA H100 80GB HBM3", ""), ("NVIDIA GeForce RTX 3090", "never run")]
)
def test_a_gpu_on_which_nothing_was_run_is_said_so(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is played: its kernels agree with their references, its library reads no layout of ours."""
    properties = SimpleNamespace(name=name, major=8, minor=6, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(
        doctor, "kernel_obstacle", lambda _, operators: "" if "linear_pack" in operators else "wrong"
    )
    monkeypatch.setattr(doctor, "why_not_one_pass", lambda _: "the kernel is wrong on this GPU")
    monkeypatch.setattr(doctor, "obstacle", lambda _: "cuSPARSELt reads another layout")
    findings = {f.subject: f.finding for f in doctor._machine(torch.device("cuda", 0))}
    assert (said in findings["2:4 kernels"]) is True
    assert ("never run" in findings["2:4 kernels"]) is bool(said)
    assert findings["kernels, narrow"] == "agree with the reference"
    assert findings["kernels, masked"] == "no: wrong"
    assert findings["kernels, AdamW of 16 bits"] == "no: the kernel is wrong on this GPU"
    assert findings["2:4 products"] == "no: cuSPARSELt reads another layout"
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert all(gpu in readme for gpu in PROVEN)


@pytest.mark.usefixtures("capable_machine")
def test_steps_of_generation_are_shown_by_rows() -> None:
    def told(device: str) -> dict[str, str]:
        found = {each.subject: each.finding for each in doctor._decoding(torch.device(device))}
        return {subject.removeprefix("decoding, "): finding for subject, finding in found.items()}

    assert set(told("cpu").values()) == {"dense"}
    measured = (
        "; with products of one input fused or not, each block its fastest, measured on the batch at hand"
    )
    everything = "dense, 2:4 weights, skipping, skipping and 2:4 weights" + measured
    assert told("cuda") == {
        "1 row": everything,
        "4 rows": everything,
        "8 rows": everything,
        "16 rows": "dense, 2:4 weights" + measured,
        "64 rows": "dense" + measured,
    }


def test_without_a_gpu_that_alone_is_why_a_prompt_of_any_length_runs_in_plain_pytorch() -> None:
    found = [each.finding for each in doctor._prefill(torch.device("cpu")) if "activations" in each.subject]
    why = "plain PyTorch (the kernels are for CUDA GPUs, this is cpu)"
    assert set(found) == {f"bfloat16: {why}; fp8: {why}"}


@pytest.mark.usefixtures("capable_machine")
def test_prompts_are_shown_by_tokens() -> None:
    found = {each.subject: each.finding for each in doctor._prefill(torch.device("cpu"))}
    told = {
        tokens: found[f"prefill, {tokens} tokens, llama-7b, 2:4 activations"] for tokens in (63, 2048, 16384)
    }
    masked, packed = "2:4 by kernels around dense products", "packed 2:4 products"
    assert told[63].startswith("bfloat16: plain PyTorch (")
    assert "T 63" in told[63]
    assert told[2048] == f"bfloat16: {masked}; fp8: {packed} in e4m3"
    assert told[16384] == f"bfloat16: {packed}; fp8: {packed} in e4m3"
    weights = {tokens: found[f"prefill, {tokens} tokens, llama-7b, 2:4 weights"] for tokens in (63, 16384)}
    assert weights[16384] == "2:4 product where a chunk is faster so"
    assert weights[63].startswith("attention: dense product (dense products are faster at T 64, 4096→4096);")
