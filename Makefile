# `make demo`: set up and train on the built-in task. `make test`: set up, check and test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PINS := $(VENV)/constraints.txt
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: setup demo claim credit rewards test isa quick check docs fuzz test-latest test-lowest package sanitize aarch64 bench gpu format clean

setup: $(INSTALLED)

# torch first and alone, so that nothing else chooses its build. constraints.txt is what CI tests, with a CPU build; a CUDA
# build wants the triton it was made with, and only that pin gives way.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed '/^triton==/d' constraints.txt > $(PINS)
	$(BIN)/pip install --quiet -c $(PINS) torch
	$(BIN)/pip show torch | grep -q '^Requires:.*triton' || cp constraints.txt $(PINS)
	$(BIN)/pip install --quiet -c $(PINS) -e ".[dev,docs]"
	touch $@

demo: setup
	$(BIN)/atmanrl train --config ledger --output_dir runs/demo --overwrite

# Three rewards on the built-in task, eight seeds each; goes on where it was stopped.
claim: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.claim
	$(BIN)/python -m benchmarks.claim_report

# Ways to assign credit to tokens, on two versions of the built-in task; goes on where it was stopped.
credit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.credit
	$(BIN)/python -m benchmarks.credit_report
	$(BIN)/python -m benchmarks.tables

# Ledger trained on what other estimators reward, five seeds each; goes on where it was stopped.
rewards: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reward_estimators
	$(BIN)/python -m benchmarks.tables

# One test file at a time per core, and a thread per process (tests/conftest.py).
PARALLEL := -n auto --maxprocesses 8 --dist loadfile
test: check docs
	$(BIN)/pytest $(PARALLEL)

# The C++ kernel and the models on it under every instruction set that this processor runs, also those it would not choose.
ISA_TESTS := $(addprefix tests/atman_kernels/,test_cpu.py test_hf.py test_hf_gradients.py test_hf_key_bias.py test_hf_packed.py)
isa: setup
	set -e; for isa in $$($(BIN)/python -c "from atman_kernels import _cpu; print(*_cpu.isas())"); do \
	  echo "ATMAN_CPU_ISA=$$isa"; ATMAN_CPU_ISA=$$isa $(BIN)/pytest $(PARALLEL) -q $(ISA_TESTS); done

# The tests without those marked slow.
quick: setup
	$(BIN)/pytest $(PARALLEL) -m "not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every property on random cases, 30 times as many as in make test and others every time: over ten thousand of attention.
fuzz: setup
	ATMAN_FUZZ=30 $(BIN)/pytest -n 3 -m hypothesis tests

# The tests with the newest dependencies that the bounds in pyproject.toml allow, in an environment of its own. The build
# of torch may be chosen: make test-latest TORCH=torch==2.13.0
TORCH ?= torch
test-latest:
	$(PYTHON) -m venv build/latest
	build/latest/bin/pip install --quiet --upgrade $(TORCH)
	build/latest/bin/pip install --quiet --upgrade $(TORCH) -e ".[dev]"
	build/latest/bin/pytest --ignore tests/test_packaging.py

# The same with the oldest: torch in the build that the index gives.
test-lowest:
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/pip install --quiet uv
	build/lowest/bin/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct -e ".[dev]"
	build/lowest/bin/pytest --ignore tests/test_packaging.py

# A source distribution, a wheel built from it, and that wheel in an empty environment, where doctor tests the kernels.
package: setup
	rm -rf dist build/package
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/package
	build/package/bin/pip install --quiet -c $(PINS) torch
	build/package/bin/pip install --quiet -c $(PINS) dist/*.whl
	cd build/package && bin/atmanrl doctor

# The site, in build/site; a page without a menu entry, a broken link or an unknown object fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The tests of the C++ kernel on a build with the address and undefined-behaviour sanitizers, whose runtimes have to be
# loaded before everything else.
sanitize: setup
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/sanitize/package -C build-dir=build/sanitize/cmake \
	  -C cmake.build-type=RelWithDebInfo -C cmake.define.ATMAN_SANITIZE=address,undefined .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  ATMAN_EXTENSION=$$(echo build/sanitize/package/atman_kernels/_C*.so) \
	  $(BIN)/python -m pytest -p no:cacheprovider tests/atman_kernels/test_cpu.py tests/atman_kernels/test_cpu_binding.py \
	  tests/atman_kernels/test_statistics.py -k "not triton"

# The kernels built for aarch64 and tested under emulation; on Debian: apt install cmake g++-aarch64-linux-gnu qemu-user
aarch64:
	cmake -S . -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
	  -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64 -DATMAN_PYTHON=OFF -DATMAN_KERNEL_TEST=ON
	cmake --build build/aarch64
	ctest --test-dir build/aarch64 --verbose

# CPU-sized benchmarks with their peers.
bench: setup
	$(BIN)/pytest benchmarks/bench_cpu.py

# GPU tests, tuning and benchmarks, in the Python that has a CUDA build of torch; nothing is installed or downloaded.
# make gpu RESULTS=DIR keeps the results there.
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(if $(RESULTS),--results $(RESULTS))

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache
