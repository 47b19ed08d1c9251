# `make test` and `make demo` set up everything that they need in .venv; a second run starts in seconds.
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := $(shell find include src python CMakeLists.txt pyproject.toml -type f ! -name '*.pyc')

.PHONY: test demo cpp-test python-test check format clean

test: check cpp-test python-test

$(VENV)/.ready: requirements-dev.txt scripts/setup.sh
	bash scripts/setup.sh $(VENV)
	touch $@

check: $(VENV)/.ready
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.c')
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) scripts/check_layers.py

format: $(VENV)/.ready
	$(VENV)/bin/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.c')
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

cpp-test: $(VENV)/.ready
	$(VENV)/bin/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DSTROBE_TESTS=ON
	$(VENV)/bin/cmake --build build/cpp
	$(VENV)/bin/ctest --test-dir build/cpp --output-on-failure

$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@

python-test: $(VENV)/.installed
	$(PY) -m pytest -q -p no:cacheprovider tests/py

demo: $(VENV)/.installed
	$(PY) demo/main.py

clean:
	rm -rf build dist .venv .venv-*
