# Every target makes .venv itself. LAMINA_PYTHON picks another interpreter (>= 3.11).
LAMINA_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo
# Tests on outside data are skipped by name where this is not set.
export LAMINA_TEST_DATA

.PHONY: demo test test-long lint types protos bench setup clean

setup: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(LAMINA_PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2 GB with torch, some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/lamina simulate --multirun strategy=recompress,residual,stack,zeropad \
	  clients.count=10 'clients.ranks=[32,16,8,8,4,4,2,2,2,2]' rounds=4 train.local_steps=12 \
	  train.max_length=64 evaluate.max_examples=100 output=$(DEMO)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pydoclint --quiet protos strategies server client simulations audits
	PYTHONPATH=. $(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

# The code of the protocols, from their .proto files; a test sees when it is stale.
protos: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
	  $(patsubst protos/%,lamina/protos/%,$(wildcard protos/*.proto))

test: $(STAMP) lint types
	$(BIN)/python -m pytest

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

bench: $(STAMP)
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/importance.py
	$(BIN)/python benchmarks/encoder.py
	$(BIN)/python benchmarks/transport.py
	$(BIN)/python benchmarks/quantised.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/fleet.py
	$(BIN)/python benchmarks/beside.py
	$(BIN)/python benchmarks/privacy.py
	$(BIN)/python benchmarks/private_quality.py
	$(BIN)/python benchmarks/audit.py

clean:
	rm -rf $(VENV) outputs dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
