"""What llama.cpp makes of our GGUF: text in, the same tokens and the same text out.

llama.cpp comes as a wheel that no extra of act24 brings: `pip install xllamacpp`, then `pytest -m slow` here.
"""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch

from act24.inference.sampling import Sampling
from act24.passes import Relu2FFN
from act24.tools.commands.generate import open_generator, open_model
from act24.tools.run.train import train

pytestmark = pytest.mark.slow
xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp, a llama.cpp as a wheel")
pytest.importorskip("gguf")

TOKENS = 24
PROMPTS = ["low rank", "two of four", "naïve 漢字 🙂\r\nlow", "  the graph's\n\n\tpass 2024"]


class LlamaCpp:
    """Its server, in this process, for one file; its answers are JSON."""

    def __init__(self, file) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 256, 1, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        # By default it rounds keys, values and attention to float16.
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.verbosity, parameters.fit_params = 0, False
        self._server = xllamacpp.Server(parameters)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __call__(self, what: str, **content) -> dict:
        address, headers = f"{self._server.listening_address}/{what}", {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(content).encode(), headers)
        with self._opener.open(request, timeout=60) as answer:
            return json.load(answer)


@pytest.mark.parametrize(
    ("passes", "changes"),
    [
        ((Relu2FFN(),), ("model.num_key_value_heads=1", "model.rope_theta=5000")),
        ((), ("model.tie_word_embeddings=true",)),
    ],
    ids=["arcee", "llama"],
)
def test_llama_cpp_continues_text_as_act24_does(act24, tiny, tmp_path, passes, changes):
    # Large first weights: a tiny model that learned more says the same word for ever.
    first = ("train.seed=3", "model.initializer_range=0.3")
    recipe = tiny("train.steps=8", "eval.every=0", *first, *changes)
    train(recipe.model_copy(update={"passes": passes}), tmp_path / "run")
    file = tmp_path / "model.gguf"
    status, _, _ = act24("export", tmp_path / "run", file, "--as", "gguf")
    assert status == 0
    built = open_model(tmp_path / "run", device="cpu")
    generator, tokenizer = open_generator(built), built.open_tokenizer()
    theirs, seen = LlamaCpp(file), set()
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).tolist()
        assert theirs("tokenize", content=prompt)["tokens"] == ids
        (ours,) = generator([prompt], TOKENS, Sampling(temperature=0))
        with torch.no_grad():
            logits = built.model(torch.tensor([[*ids, *ours.tokens]]))[0, len(ids) - 1 : -1]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a tie, which rounding would decide"
        answer = theirs("completion", prompt=prompt, n_predict=TOKENS, temperature=0, return_tokens=True)
        assert answer["tokens"] == [*ours.tokens]
        assert answer["content"] == ours.text
        assert (answer["stop_type"] == "eos") == (ours.reason == "end")
        seen |= {*ours.tokens}
        options = ("--tokens", TOKENS, "--temperature", 0, "--device", "cpu")
        status, text, _ = act24("generate", tmp_path / "run", "--prompt", prompt, *options)
        assert (status, text) == (0, prompt + answer["content"] + "\n")
    assert len(seen) > 10, "and not one token for ever"
