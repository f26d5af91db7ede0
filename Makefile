# Every target but `clean` sets up .venv first, if need be: a fresh machine needs `make`, some python3 with pip and a Python >= 3.12.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.maxtext-ling2-ready
PYTEST := $(BIN)/python -m pytest
WORKERS := 2

.PHONY: help setup test-quick test test-all coverage demo docs docs-test dist interop lint format bench clean always
help:
	@echo "make setup      create $(VENV) and install everything into it (PYTHON=... names the interpreter)"
	@echo "make test-quick the tests of pure functions, in under a minute"
	@echo "make test       the tests, without the slow ones (ARGS='-k gla' passes arguments to pytest)"
	@echo "make test-all   all tests"
	@echo "make coverage   the tests of 'make test', and which lines of the package they do not run"
	@echo "make demo       train LING2 on real text and draw the loss curve"
	@echo "make docs       build the pages into build/site"
	@echo "make docs-test  run the commands of README and docs that are marked so"
	@echo "make dist       build sdist and wheel into dist/, install the wheel into a new environment and use it"
	@echo "make interop    open an exported folder in transformers, vLLM, SGLang and mlx-lm (2 GB of environments in build/)"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff format and mend what it can"
	@echo "make bench      the benchmarks"
	@echo "make clean      remove what the others left, $(VENV) too"

setup: $(READY)

# The mark is set after everything else, so an interrupted set-up is done again. A Python that has gone makes it stale, too.
$(READY): pyproject.toml maxtext_ling2/constraints.txt scripts/set_up $(wildcard site_files/*) $(if $(shell $(BIN)/python -c 'print(1)' 2>/dev/null),,always)
	@scripts/set_up $(VENV)
	@touch $@

# Environment (CPU, cache of compiled programs): tests/conftest.py, so that pytest by hand has the same.
test-quick: $(READY)
	$(PYTEST) -n $(WORKERS) -m "unit and not slow" $(ARGS)

test: $(READY)
	$(PYTEST) -n $(WORKERS) -m "not slow" $(ARGS)

test-all: $(READY)
	$(PYTEST) -n $(WORKERS) $(ARGS)

coverage: $(READY)
	@mkdir -p .cache
	$(PYTEST) -n $(WORKERS) -m "not slow" --cov --cov-report=term-missing:skip-covered $(ARGS)

demo: $(READY)
	$(BIN)/maxtext-ling2 demo $(ARGS)

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

docs-test: $(READY)
	$(BIN)/python scripts/docs_test $(ARGS)

dist: $(READY)
	scripts/dist_test $(VENV)

# Environments of their own, in build/interop: nothing of it is installed by `make setup`.
interop: $(READY)
	$(BIN)/python scripts/interop $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/gla_chunked.py
	$(BIN)/python benchmarks/gla_tpu_static.py --quick
	$(BIN)/python benchmarks/layer_tpu_static.py --chip v6e
	$(BIN)/python benchmarks/experts_tpu_static.py
	$(BIN)/python benchmarks/scan_compile.py

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build dist demo_output maxtext_output
