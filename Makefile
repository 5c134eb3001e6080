# Two commands do everything: `make figure` and `make test`. Both make .venv on first use.
PYTHON ?= python3
JAX ?= cuda13
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: figure test slow bench gpu faults check clean

figure: $(VENV)/.figures  ## the Data Diet figure from real digits, with its claims
	$(BIN)/python -m experiments data_diet configs/data_diet/digits.py
	$(BIN)/python -m paper_figures data_diet_pruning

test: $(VENV)/.tests  ## all tests that take seconds; lint, types and import layers are among them
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/.tests  ## the tests that take minutes
	$(BIN)/python -m pytest -n 2 -m slow

bench: $(VENV)/.tests  ## speed and memory beside bare computations and peers
	$(BIN)/python -m benchmarks

gpu: $(VENV)/.tests  ## all that wants an accelerator; jax for it is installed first (JAX=cuda13, tpu)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'jax[$(JAX)]'
	$(BIN)/python -m benchmarks resnet_training populations grand_resnet grand_transformer
	-JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false \
		XLA_FLAGS=--xla_gpu_deterministic_ops=true $(BIN)/python -m pytest
	$(BIN)/python -m experiments data_diet configs/data_diet/cifar10.py

faults: $(VENV)/.tests  ## 204 faults (kills, full disks, flipped bits ...) on a run that must survive them
	$(BIN)/python tests/faults.py --rounds 204

check: $(VENV)/.tests  ## format, lint, types
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(VENV)/.figures: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[figures]'
	touch $@

$(VENV)/.tests: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[figures,data,cluster,test,lint]'
	touch $@ $(VENV)/.figures
