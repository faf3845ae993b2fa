# One command for each thing. `make test` and `make bench` set everything up by themselves, once.
#
#   make test           the whole test suite           make lint      formatters, linters, types, import floors
#   make bench          benchmarks against eager       make docs      the documentation site, into site/
#   make build          compile csrc/ in place         make room NAME=foo [FLOOR=ops]   a new room that works
#   make compile-table  every GPU kernel compiled for sm_80, sm_90a and sm_100, with registers and spills
#   make recipes        every recipe at its tiny size: trains, generates, writes docs/recipes-measured.md
#   make gpu            on a machine with a GPU: build, its tests, sanitizer and benchmarks, by PYTHON's own packages;
#                       PART=attention|linear|moe|slices or room names: only these rooms
#
#   PYTHON=python3.12   the Python to start from (3.10 or later, with pip); ARGS="..." goes to the tool behind the target
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: setup build test bench lint docs room compile-table recipes gpu clean
.DELETE_ON_ERROR:

# How csrc/ is compiled is part of the stamp's name: asking for another way builds again.
export MMKERNELS_BUILD ?= auto
BUILT := $(VENV)/.built-$(MMKERNELS_BUILD)

setup: $(VENV)/.ready
build: $(BUILT)

$(VENV)/.ready: pyproject.toml tools/environment.py
	@$(PYTHON) tools/environment.py $(VENV)
	@touch $@

$(BUILT): $(VENV)/.ready setup.py CMakeLists.txt $(shell find csrc -type f)
	@echo "build: csrc/ -> mmkernels/ (MMKERNELS_BUILD=$(MMKERNELS_BUILD))"
	@rm -f $(VENV)/.built-*
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace > $(VENV)/build.log 2>&1 \
		|| { cat $(VENV)/build.log; exit 1; }
	@touch $@

# Two processes of one thread each: on few cores more of either only wait for each other.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

bench: build
	$(BIN)/mmkernels bench $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright
	$(BIN)/python -c "from importlinter.cli import lint_imports_command as lint; lint()"
	$(BIN)/python -m pytest tests/test_architecture.py

docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

compile-table: build
	$(BIN)/python -m benchmarks.compile_table $(ARGS)

recipes: build
	OMP_NUM_THREADS=1 $(BIN)/python tools/recipes.py $(ARGS)

gpu:
	@tools/gpu.sh $(PYTHON) $(ARGS)

FLOOR ?= ops
room: $(VENV)/.ready
	@$(BIN)/python tools/room.py "$(NAME)" $(FLOOR)
	@$(BIN)/ruff check --quiet --select I --fix mmkernels/__init__.py
	@$(BIN)/ruff format --quiet mmkernels/__init__.py mmkernels/$(FLOOR)/$(NAME)

clean:
	rm -rf build site *.egg-info mmkernels/*.so mmkernels/_build_info.json $(VENV)/.built-*
