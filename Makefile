# `make demo` and `make test` set up everything themselves; nothing but Python 3.10 to 3.13 with pip and venv is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
RUN := -e ".[export,ort]"
# uv takes a third of pip's time, but does not read pip's configuration: pip installs where that names another index.
install = if ! $(BIN)/python -m pip config list | grep -q "[.]index-url" && $(UV) -c constraints.txt $(1); then :; \
  else echo "installing with pip"; $(PIP) -c constraints.txt $(1); fi
# Compiled modules are kept: without them every test that starts a Python compiles PyTorch's 2,000 files.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint fuzz aarch64 trt86 docs lowest picture clean
.DELETE_ON_ERROR:

demo: $(VENV)/run.stamp
	$(BIN)/edgeprune build --device cpu

# pip, apt and the network wait for one another no more than they must.
test:
	$(MAKE) --jobs=2 lint $(VENV)/debian.stamp $(VENV)/aarch64.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check edgeprune tests benchmarks
	$(BIN)/ruff format --check edgeprune tests benchmarks
	$(BIN)/lint-imports
	$(BIN)/mypy

# The slow tests: twenty times as many damaged files, builds killed at random moments, all stored simulated builds, and
# a measured build of the real ViT-Tiny.
fuzz: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

# The tests of the device half on an emulated aarch64 processor, alone.
aarch64: $(VENV)/dev.stamp $(VENV)/debian.stamp $(VENV)/aarch64.stamp
	$(BIN)/python -m pytest -n 0 tests/aarch64

# Every kind of ONNX file given to the ONNX parser of TensorRT 8.6.0 itself: 2.9 MB, out of a download of 819 MB.
trt86: $(VENV)/dev.stamp
	cd tests && $(abspath $(BIN))/python -m support.trt86.fetch $(abspath $(VENV))/trt86
	EDGEPRUNE_TRT86=$(abspath $(VENV))/trt86 $(BIN)/python -m pytest tests/trt_judge

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict

# The oldest versions that pyproject.toml allows, in an environment of their own: a build and the quick tests.
lowest: $(LOWEST)/stamp
	$(LOWEST)/bin/edgeprune build --device orin-nano --simulate --method topk --search-images 8 --neighbours 0 \
	  --work $(LOWEST)/work --out $(LOWEST)/bundle
	$(LOWEST)/bin/edgeprune verify $(LOWEST)/bundle
	$(LOWEST)/bin/python -m pytest tests/scheduling tests/latency tests/devices tests/vit/test_reducers.py tests/test_records.py

$(LOWEST)/stamp: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check uv
	VIRTUAL_ENV=$(LOWEST) $(LOWEST)/bin/uv pip install --quiet --resolution lowest-direct -e ".[export,ort]"
	VIRTUAL_ENV=$(LOWEST) $(LOWEST)/bin/uv pip install --quiet pytest pytest-timeout pytest-xdist hypothesis scipy
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	-$(PIP) uv

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(RUN))
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(call install,-r requirements-dev.txt)
	touch $@

$(VENV)/docs.stamp: docs/requirements.txt | $(BIN)/python
	$(call install,-r docs/requirements.txt)
	touch $@

# What some tests drive for real: a browser and an SSH server. Without root or apt-get those tests are skipped by name.
$(VENV)/debian.stamp: $(VENV)/run.stamp
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends chromium openssh-server >/dev/null \
	  || echo "chromium and openssh-server could not be installed: the tests that need them are skipped"; \
	else echo "not root, or no apt-get: tests that need chromium or sshd are skipped where those are missing"; fi
	touch $@

# An aarch64 Python under QEMU for the tests of the device half. Where it cannot be had they are skipped by name.
$(VENV)/aarch64.stamp: tests/aarch64/setup.sh constraints.txt $(VENV)/run.stamp
	tests/aarch64/setup.sh $(VENV)/aarch64 $(BIN)/python
	touch $@

# The picture of the README: the page of a build of the embedded model on simulated latencies, so that it can be repeated.
picture: $(VENV)/run.stamp $(VENV)/debian.stamp
	$(BIN)/edgeprune build --device orin-nano --simulate --precision fp16 --batch 32 --speedup 2.5 --out $(VENV)/picture
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir=$(abspath $(VENV))/chromium \
	  --window-size=1120,1565 --screenshot=docs/report.png "file://$(abspath $(VENV))/picture/report.html"

clean:
	rm -rf $(VENV) $(LOWEST) engines/.work site
