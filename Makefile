# Each target makes .venv with what it needs and works on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-whole test-engines test-docs lint docs clean

.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/test: .venv/base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/base   ## sweep N on the bundled digits and print the comparison
	$(BIN)/python -m gaccum_exp -m accum.steps=1,2,4,8 noise.every_steps=3

test: .venv/test   ## the whole suite on two cores, a thread for each worker
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-whole: .venv/test   ## what `make test` leaves out of the long checks, some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m whole

test-engines: .venv/test   ## sweeps on Ray, Slurm, Optuna and queues, some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines

test-docs: .venv/test   ## every command and block of Python of the pages as written, half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m pages -rs -n 2 --dist loadgroup tests/docs

lint: .venv/test   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/test   ## the site, in docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -n -c docs -d docs/_build/doctrees . docs/_build/html

clean:
	rm -rf docs/_build .venv outputs multirun mlruns mlflow.db
