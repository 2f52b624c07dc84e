# Everything runs in .venv, made from the lock file; only Python >= 3.11 and make are needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: env demo test lint bench clean

env: .venv/.made

.venv/.made: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check -e .
	touch $@

# personas, 40 clients: fedvpa-gp against one shared reward, on features of a real language model
demo: env
	rm -rf runs/demo
	$(BIN)/fedvpa compare --methods fedvpa-gp,fedavg-btl --seeds 0 --data personas --clients 40 \
	  --data.personas.pairs 10 --layer 10 --rounds 40 --unseen-clients 10 --context 8 --out runs/demo

test: env
	$(BIN)/pytest -n 2 --dist worksteal

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: env
	$(BIN)/python -m benchmarks.simulation --quick

clean:
	rm -rf .venv runs build
