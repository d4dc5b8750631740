# make demo    train a real pretrained encoder with LoRA beside stock PEFT, on this machine
# make test    all tests        make lint   what CI checks first
# make bench   CPU benchmarks   make gpu    build, tests, tuning and benchmarks on an NVIDIA GPU, within 9 minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILT_FROM := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
CORES := $(shell getconf _NPROCESSORS_ONLN)
# More workers than this only read the disk against one another.
WORKERS ?= $(shell [ $(CORES) -lt 8 ] && echo $(CORES) || echo 8)
PIP_FLAGS := --quiet --no-compile -c constraints.txt
RESULTS ?= $$($(BIN)/python -m benchmarks.provenance)

.PHONY: setup demo test lint bench gpu clean

setup: $(STAMP)

# torch comes before what depends on it, pinned: pulled in as a dependency, pip could take another build of it. The native
# parts need neither and compile meanwhile. Of 14,000 modules a few are imported, which writes their bytecode.
$(STAMP): $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) 'setuptools>=77' pybind11 ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace & build=$$!; \
	  $(BIN)/python -m pip install $(PIP_FLAGS) "$$(grep '^torch==' constraints.txt)" && \
	  PEFT_KERNELS_BUILD=0 $(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'; \
	  installed=$$?; wait $$build && exit $$installed
	touch $@

demo: setup
	$(BIN)/peft-kernels finetune --compare --output outputs/demo

# PEFT_KERNELS_AOT=all compiles every Triton configuration of tuning/ instead of one of each kind.
# One thread a worker: PyTorch's own threads would fight the other workers for the cores. Bytecode is written whatever the
# environment says: the tests start many processes, each of which would compile the library.
test: setup
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A missed bar is printed and does not stop the rest.
bench: setup
	mkdir -p "$(RESULTS)"
	for file in benchmarks/bench_*.py; do \
	  $(BIN)/python -m pytest $$file -q --benchmark-json="$(RESULTS)/$$(basename $$file .py).json" || exit 1; \
	done
	-$(BIN)/python -m benchmarks.host_time --json "$(RESULTS)/host_time.json"
	-$(BIN)/python -m benchmarks.block_memory --json "$(RESULTS)/block_memory.json"
	-$(BIN)/python -m benchmarks.nf4_time --json "$(RESULTS)/nf4_time.json"
	-$(BIN)/python -m benchmarks.multi_time --json "$(RESULTS)/multi_time.json"
	-$(BIN)/python -m benchmarks.masked_time --json "$(RESULTS)/masked_time.json"
	-$(BIN)/python -m benchmarks.block_sparse_time --json "$(RESULTS)/block_sparse_time.json"
	-$(BIN)/python -m benchmarks.csr_time --json "$(RESULTS)/csr_time.json"
	-$(BIN)/python -m benchmarks.delta_time --json "$(RESULTS)/delta_time.json"
	$(BIN)/python -m benchmarks.report "$(RESULTS)"/bench_*.json
	$(BIN)/python -m benchmarks.charts "$(RESULTS)/bench_sweep.json"
	$(BIN)/python -m benchmarks.density_charts --results "$(RESULTS)"

# Takes the python on the PATH with whatever it has and installs nothing: a GPU machine may have no network.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh

clean:
	rm -rf build outputs .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find peft_kernels -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(STAMP)
