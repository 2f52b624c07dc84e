# Everything runs in .venv, made from the lock file; only Python >= 3.11 and make are needed.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

.PHONY: env demo test test-slow soak lint docs notebook wheel sbom audit lock bench clean

env: .venv/.made

# every file is checked against its hash; torch, which is built for many kinds of machines, is pinned
# to a version and comes by itself
.venv/.made: requirements.lock requirements-torch.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --disable-pip-version-check -r requirements-torch.lock
	$(BIN)/pip install --quiet --no-deps --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check -e .
	touch $@

# personas, 40 clients: fedvpa-gp against one shared reward, on features of a real language model
demo: env
	rm -rf runs/demo
	$(BIN)/fedvpa compare --methods fedvpa-gp,fedavg-btl --seeds 0 --data personas --clients 40 \
	  --pairs 10 --layer 10 --rounds 40 --unseen-clients 10 --context 8 --out runs/demo
	@echo "a page on which you teach it: $(BIN)/fedvpa serve runs/demo/fedvpa-gp-seed0"

# the tests for every change: laws, numbers, pages, doctests (minutes)
test: env
	$(PYTEST) -m "not slow and not soak"

# what starts processes, language models, or federations
test-slow: env
	$(PYTEST) -m "slow and not soak" tests

# kills, fuzzing and load, as long as it takes; the result goes to results/soak.json
soak: env
	$(BIN)/python tools/soak.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the documentation's site in build/site; broken links and missing references fail
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# the first hour, executed anew (its outputs are kept in the file)
notebook: env
	$(BIN)/python tools/run_notebook.py examples/first_hour.ipynb

wheel: env sbom
	$(BIN)/python -m build --wheel --no-isolation

# what is in the environment, with licences, as CycloneDX
sbom: env
	mkdir -p dist
	$(BIN)/cyclonedx-py environment .venv --pyproject pyproject.toml --of JSON -o dist/fedvpa.cdx.json

# known vulnerabilities of what is locked (asks pypi.org)
audit: env
	$(BIN)/pip-audit --require-hashes --disable-pip -r requirements.lock

# the versions of this environment with the hashes of all their files; needs uv
lock:
	mkdir -p build
	$(BIN)/pip freeze --all --exclude-editable --exclude torch --exclude pip > build/frozen.txt
	uv pip compile --quiet --no-deps --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --universal --python-version 3.11.5 build/frozen.txt -o requirements.lock

bench: env
	$(BIN)/python -m benchmarks.simulation --quick

clean:
	rm -rf .venv runs build dist
