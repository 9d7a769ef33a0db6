# `make test` and `make demo` work on a fresh clone: they set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.peft-s2a-installed

.PHONY: setup check format test test-oldest docs bench bench-quick demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[examples,dev,docs]"
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 $(ARGS)

# the oldest supported torch, peft, transformers and accelerate, in an environment without torchvision and timm (whose tests skip)
OLDEST_BIN := .venv-oldest/bin
OLDEST_STAMP := .venv-oldest/.peft-s2a-installed
OLDEST_TORCH := torch==2.13.0
OLDEST := peft==0.21.0 transformers==5.10.1 accelerate==1.10.0 huggingface_hub==1.33.0
OLDEST_TESTS := tests/interception tests/integrations/test_hub.py tests/integrations/test_trainer.py \
	tests/tuner/test_adapters.py tests/tuner/test_compile.py tests/tuner/test_families.py \
	tests/tuner/test_merging.py tests/tuner/test_mixed_batch.py tests/tuner/test_peft_expectations.py \
	tests/tuner/test_released_checkpoints.py

$(OLDEST_STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv --clear .venv-oldest
	$(OLDEST_BIN)/python -m pip install --quiet --disable-pip-version-check $(OLDEST_TORCH)
	$(OLDEST_BIN)/python -m pip install --quiet --disable-pip-version-check $(OLDEST) -e ".[test]"
	touch $@

test-oldest: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST_BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 $(OLDEST_TESTS) $(ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# every number, table and picture of README and documentation: hours; goes on where it was interrupted
bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

# the same on small models, without touching the results: a test runs it, too
bench-quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks --quick $(ARGS)

demo: setup
	$(BIN)/python examples/demo.py $(ARGS)

clean:
	rm -rf .venv .venv-oldest site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
