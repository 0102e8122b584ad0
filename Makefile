# Two commands: `make serve` and `make test`. Each sets up what it needs, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := pyproject.toml hatch_build.py $(wildcard engines/llamacpp/kernels/*.cpp engines/llamacpp/kernels/*.h)

.PHONY: serve test lint bench clean

serve: $(VENV)/.serve
	@$(BIN)/headwater serve

test: $(VENV)/.dev lint
	$(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks all

$(VENV)/.serve: $(BUILT)
	@./install.sh $(PYTHON) $(VENV) .
	@touch $@

$(VENV)/.dev: $(BUILT)
	@./install.sh $(PYTHON) $(VENV) '.[dev]'
	@touch $@ $(VENV)/.serve

$(VENV)/.bench: $(BUILT)
	@./install.sh $(PYTHON) $(VENV) '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist benchmarks/out
