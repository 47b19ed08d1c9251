# `make test` and `make demo` set up everything that they need in .venv; a second run starts in seconds.
VENV := .venv
PY := $(VENV)/bin/python
CMAKE := $(VENV)/bin/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
	-DPython_EXECUTABLE=$(abspath $(VENV))/bin/python -DSTROBE_TESTS=ON
CTEST := $(VENV)/bin/ctest --output-on-failure --parallel $(shell nproc)
SOURCES := $(shell find include src python scripts/embed_sources.py CMakeLists.txt pyproject.toml -type f ! -name '*.pyc')
PROBLEMS ?= 1000000
PYTHON ?= python3

.PHONY: test test-gpu check-receipt check-kernels demo bench bench-gpu cpp-test sanitize fuzz wheel-test check compat format clean

test: check check-receipt cpp-test sanitize check-kernels wheel-test

$(VENV)/.ready: requirements-dev.txt scripts/setup.sh
	bash scripts/setup.sh $(VENV)
	touch $@

check: $(VENV)/.ready
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cuh' '*.cpp' '*.c')
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) scripts/check_layers.py

format: $(VENV)/.ready
	$(VENV)/bin/clang-format -i $$(git ls-files '*.h' '*.cuh' '*.cpp' '*.c')
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

cpp-test: $(VENV)/.ready
	$(CMAKE) -B build/cpp
	$(VENV)/bin/cmake --build build/cpp
	$(CTEST) --test-dir build/cpp

build/sanitize/build.ninja: $(VENV)/.ready CMakeLists.txt
	$(CMAKE) -B build/sanitize -DSTROBE_SANITIZE=ON

# The same tests under the address and undefined-behaviour sanitizers.
sanitize: build/sanitize/build.ninja
	$(VENV)/bin/cmake --build build/sanitize
	$(CTEST) --test-dir build/sanitize

# make fuzz PROBLEMS=1000000; one problem again: build/sanitize/fuzz --seed N
fuzz: build/sanitize/build.ninja
	$(VENV)/bin/cmake --build build/sanitize --target fuzz
	build/sanitize/fuzz --problems $(PROBLEMS)

# One wheel, built from the sdist alone, serves the tests, the demo and the benchmarks.
dist/.built: $(VENV)/.ready scripts/build_wheel.py $(SOURCES)
	$(PY) scripts/build_wheel.py dist
	touch $@

wheel-test: compat
	bash scripts/test_wheel.sh $(PY)

$(VENV)/.installed: dist/.built
	$(PY) -m pip install --quiet --no-deps --force-reinstall dist/strobe-*.whl
	touch $@

# The drop-in distributions: pure Python wheels beside Strobe's own in dist/.
compat: dist/.built
	rm -f dist/fla*.whl dist/flex*.whl
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist $(addprefix ./,$(wildcard compat/*/))

# Every kernel of the shipped list for every architecture, without a GPU.
check-kernels: $(VENV)/.installed
	$(PY) scripts/check_kernels.py
	$(PY) scripts/check_sass.py build/kernels/fwd_sm90*.cubin

# The whole suite on this machine's GPUs, without a network: PYTHON has torch 2.10 or later. Writes tests/gpu/receipt.json.
test-gpu:
	$(PYTHON) tests/gpu/main.py

# Whether that receipt is of these sources, with nothing failed.
check-receipt:
	$(PYTHON) scripts/receipt.py check

# make demo PYTHON=python3 runs on that Python's torch, such as one with CUDA on a machine without a network.
ifeq ($(origin PYTHON),file)
demo: $(VENV)/.installed
	$(PY) demo/main.py $(DEMO)
else
demo:
	$(PYTHON) scripts/run_here.py demo/main.py $(DEMO)
endif

bench: $(VENV)/.installed
	$(PY) -m bench.main

# On this machine's GPU, without a network. BENCH="--quick --suite fwd" gives it options, STROBE_PEERS=DIR more peers.
bench-gpu:
	$(PYTHON) scripts/run_here.py -m bench.main --machine gpu $(BENCH)

clean:
	rm -rf build dist .venv .venv-*
