# make install   .venv with the package, its C++ kernels and the test tools
# make demo      watch a tiny model learn with forward passes only (about 3 minutes)
# make test      the whole test suite, CPU only
# make test-oldest  trainers and adapters with the oldest transformers, peft and trl (tests/oldest.txt), in .venv-oldest
# make test-long 10,000 broken files for every reader and 50 kills, with their rows in bench/results
PYTHON ?= python3
VENV   ?= .venv
OLDEST ?= .venv-oldest
# The one pin of torch: from the usual index it is the CUDA build on a GPU machine.
TORCH  ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-long test-oldest lint clean

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

test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "$(TORCH)" -c tests/oldest.txt -e ".[test]"
	$(OLDEST)/bin/python -m pytest $(PYTEST_ARGS) tests/test_hf.py tests/test_trainers.py tests/test_adapters.py tests/test_documents.py

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf build demo-out $(VENV) $(OLDEST) zo_kernels/*.so *.egg-info
