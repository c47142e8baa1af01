# `make demo`: set up and train on the built-in task. `make test`: set up, check and test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: setup demo claim test quick check docs fuzz test-latest package bench gpu format clean

setup: $(INSTALLED)

# torch first and alone: a looser first install would choose a CUDA build of several gigabytes.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,docs]"
	touch $@

demo: setup
	$(BIN)/atmanrl train --config ledger --output_dir runs/demo --overwrite

# Three rewards on the built-in task, eight seeds each; goes on where it was stopped.
claim: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.claim
	$(BIN)/python -m benchmarks.claim_report

test: check docs
	$(BIN)/pytest

# The tests without those marked slow.
quick: setup
	$(BIN)/pytest -m "not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Ten thousand random cases of attention, 34 times those of make test, and others every time.
fuzz: setup
	ATMAN_FUZZ=34 $(BIN)/pytest -n 3 tests/atman_kernels/test_properties.py

# The tests with the newest dependencies that the bounds in pyproject.toml allow, in an environment of its own. The build
# of torch may be chosen: make test-latest TORCH=torch==2.13.0
TORCH ?= torch
test-latest:
	$(PYTHON) -m venv build/latest
	build/latest/bin/pip install --quiet --upgrade $(TORCH)
	build/latest/bin/pip install --quiet --upgrade $(TORCH) -e ".[dev]"
	build/latest/bin/pytest --ignore tests/test_packaging.py

# A source distribution, a wheel built from it, and that wheel in an empty environment, where doctor tests the kernels.
package: setup
	rm -rf dist build/package
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/package
	build/package/bin/pip install --quiet -c constraints.txt torch
	build/package/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd build/package && bin/atmanrl doctor

# The site, in build/site; a page without a menu entry, a broken link or an unknown object fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# CPU-sized benchmarks with their peers.
bench: setup
	$(BIN)/pytest benchmarks/bench_cpu.py

# GPU tests, tuning and benchmarks, in the Python that has a CUDA build of torch; nothing is installed or downloaded.
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache
