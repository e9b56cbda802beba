# make install   .venv with the package, its C++ kernels and the test tools
# make demo      watch a tiny model learn with forward passes only (about 3 minutes)
# make test      the whole test suite, CPU only
# make test-long 10,000 broken files for every reader and 50 kills, with their rows in bench/results
PYTHON ?= python3
VENV   ?= .venv
# The one pin of torch: from the usual index it is the CUDA build on a GPU machine.
TORCH  ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-long lint clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[test]"
	touch $(STAMP)

demo: install
	$(BIN)/zo demo --output-dir demo-out

test: install
	$(BIN)/python -m pytest -n 2 --durations=10 $(PYTEST_ARGS) tests

test-long: install
	ZO_LONG=1 $(BIN)/python -m pytest -n 2 --durations=10 $(PYTEST_ARGS) tests -k "fuzz_readers or kills"

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf build demo-out $(VENV) zo_kernels/*.so *.egg-info
