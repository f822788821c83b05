# Two commands set up everything: `make demo` and `make test`. Nothing else needs to be installed first
# but Python 3.10 to 3.13 with pip and venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/run.stamp
	$(BIN)/edgeprune build --device cpu

test: $(VENV)/dev.stamp lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check edgeprune tests benchmarks
	$(BIN)/ruff format --check edgeprune tests benchmarks
	$(BIN)/mypy

$(VENV)/run.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[export,ort,report]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) -e ".[export,ort,report,train]" -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) engines/.work
