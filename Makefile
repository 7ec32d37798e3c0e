# make demo and make test each do all the set-up on a fresh Debian or Ubuntu; make .venv does just that.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: .venv demo test test-arm64 test-long bench docs kernel-tools arm64-tools clean

.venv: .venv/installed

# a file that is written last: an interrupted installation is taken up again
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python {sys.version} is too old; edgedyn needs 3.10 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv || { apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv .venv; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev,kernels,tensorrt-check]'
	touch $@

# with our kernels where they can be compiled, else for the stock runtime
demo: .venv
	rm -rf demo-out
	mkdir demo-out
	$(BIN)/python tools/make_noisy.py demo-out/noisy.png
	if $(BIN)/edgedyn ops build; then kernels=.fused; fi; \
	  $(BIN)/edgedyn build recipes/mallenet-s.phone.int8$$kernels.yaml -o demo-out/bundle
	$(BIN)/edgedyn run demo-out/bundle demo-out/noisy.png -o demo-out/denoised
	@echo
	@echo "bundle    demo-out/bundle"
	@echo "report    demo-out/bundle/report.html"
	@echo "photo     demo-out/denoised/noisy.png, from demo-out/noisy.png"

# the fused kernels are optional: without these their tests are skipped, with the reason
kernel-tools:
	@test -e /usr/include/hwy/highway.h && command -v c++ > /dev/null || \
	  { apt-get update && apt-get install -y g++ libhwy-dev; } > /dev/null 2>&1 || \
	  echo "no C++ compiler or no Highway: apt-get install g++ libhwy-dev"

# so is ARM64: a compiler for it and an emulator
arm64-tools:
	@command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64-static > /dev/null || \
	  { apt-get update && apt-get install -y g++-aarch64-linux-gnu qemu-user-static; } > /dev/null 2>&1 || \
	  echo "no compiler for ARM64 or no emulator: apt-get install g++-aarch64-linux-gnu qemu-user-static"

test: .venv kernel-tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# every op and every phone recipe; make test runs the quick ones of these where the tools are installed
test-arm64: .venv kernel-tools arm64-tools
	$(BIN)/pytest --numprocesses 2 -m arm64

test-long: .venv kernel-tools
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "slow or not slow"
	$(BIN)/python tools/fuzz_readers.py --mutations 10000 --out fuzz-readers.json
	$(BIN)/python tools/build_all.py --workers 2 --out builds.json

# site/index.html: the pages of docs/ and an API reference; warnings are errors, no page loads from the network
docs: .venv
	$(BIN)/pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv
	$(BIN)/python tools/bench.py

clean:
	rm -rf .venv demo-out site
