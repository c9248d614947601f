"""Prune a model of LLaMA-7B's size on a GPU that may use no more memory than a 24 GB card has.

    python -m act24.tools.experiments.prune_memory WORK REPORT.json             each method, 128 rows of 2,048
    python -m act24.tools.experiments.prune_memory WORK REPORT.json --methods wanda --memory-gib 12
    python -m act24.tools.experiments.prune_memory WORK REPORT.json --device cpu --samples 1 --seqlen 64

The weights are drawn, in bfloat16: time and memory do not depend on their values. What runs is `act24 prune`
as a user calls it, from a folder to a folder, with the built-in text. The allocator refuses what goes beyond
the limit; CUDA's own context lies outside it, which is why the limit is a gibibyte below the card's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import resource
import shutil
import time
from pathlib import Path

import tokenizers
import torch

from act24.llama import llama_config
from act24.recipes.load import load_recipe
from act24.tools.commands.recovery import calibration_data
from act24.tools.data import open_tokenizer
from act24.tools.data.tokenizer import END_OF_TEXT
from act24.tools.pruning.folder import prune_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("work", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--preset", default="llama-7b")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--memory-gib", type=float, default=23.0, help="what PyTorch may reserve on the GPU")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    dense = given.work / "dense"
    if not dense.exists():
        draw(given.preset, dense, given.device)
    said: dict[str, object] = {"card": "none"}
    if given.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(given.memory_gib * 2**30 / card.total_memory)
        said = {"card": card.name, "limit_gib": given.memory_gib}
    said |= {
        "torch": torch.__version__,
        "preset": given.preset,
        "rows": given.samples,
        "seqlen": given.seqlen,
    }
    rows = []
    for method in given.methods:
        rows.append(said | {"method": method} | one(dense, method, given))
        print(json.dumps(rows[-1]), flush=True)
        given.report.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def draw(preset: str, folder: Path, device: str) -> None:
    """A model with drawn weights and a tokenizer, as `transformers` writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = {
        key: value for key, value in dataclasses.asdict(llama_config(preset)).items() if value is not None
    }
    config = LlamaConfig(**known)
    torch.set_default_dtype(torch.bfloat16)  # host memory could hold no float32 beside it
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters drawn", flush=True)
    model.save_pretrained(folder)
    recipe = load_recipe("demo")
    backend = tokenizers.Tokenizer.from_str(open_tokenizer(recipe.data, recipe.tokenizer).to_json())
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT[0]).save_pretrained(folder)


def _say(line: str) -> None:
    """A line of the command, with the memory that it took so far: a run that is cut has said it."""
    gpu = torch.cuda.max_memory_reserved() / 2**30
    print(f"{line} [GPU {gpu:.1f} GiB, host {_host()}]", flush=True)


def _host() -> str:
    """Memory of the process: what no file stands behind, and files' pages, which the system takes back."""
    status = Path("/proc/self/status").read_text()
    own, pages = (
        float(re.findall(rf"{key}:\s+(\d+) kB", status)[0]) / 2**20 for key in ("RssAnon", "RssFile")
    )
    return f"{own:.1f} GiB and {pages:.1f} of files"


def one(dense: Path, method: str, given: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory of one `act24 prune`."""
    out = given.work / method
    if given.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    done = prune_model(
        str(dense),
        out,
        method=method,
        pattern="2:4",
        data=calibration_data("builtin", ()),
        samples=given.samples,
        seqlen=given.seqlen,
        device=given.device,
        say=_say,
    )
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {
        "seconds": seconds,
        "sparsity": done.sparsity,
        "weights": len(done.masks),
        "gpu_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "gpu_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "folder_gib": size / 2**30,
    }


if __name__ == "__main__":
    main()
