# Two commands set up everything: `make demo` and `make test`. Nothing else needs to be installed first
# but Python 3.10 to 3.13 with pip and venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint picture clean
.DELETE_ON_ERROR:

demo: $(VENV)/run.stamp
	$(BIN)/edgeprune build --device cpu

test: $(VENV)/dev.stamp $(VENV)/debian.stamp lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check edgeprune tests benchmarks
	$(BIN)/ruff format --check edgeprune tests benchmarks
	$(BIN)/mypy

$(VENV)/run.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[export,ort]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) -e ".[export,ort,train]" -r requirements-dev.txt
	touch $@

# What some tests drive for real: a browser and an SSH server. Without root or apt-get those tests are skipped by name.
$(VENV)/debian.stamp: $(VENV)/run.stamp
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends chromium openssh-server >/dev/null \
	  || echo "chromium and openssh-server could not be installed: the tests that need them are skipped"; \
	else echo "not root, or no apt-get: tests that need chromium or sshd are skipped where those are missing"; fi
	touch $@

# The picture of the README: the page of a build of the embedded model on simulated latencies, so that it can be repeated.
picture: $(VENV)/run.stamp $(VENV)/debian.stamp
	$(BIN)/edgeprune build --device orin-nano --simulate --precision fp16 --batch 32 --speedup 2.5 --out $(VENV)/picture
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir=$(abspath $(VENV))/chromium \
	  --window-size=1120,1565 --screenshot=docs/report.png "file://$(abspath $(VENV))/picture/report.html"

clean:
	rm -rf $(VENV) engines/.work
