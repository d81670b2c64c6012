PYTHON ?= python3.11
VENV ?= .venv
DIST ?= dist
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-slow test-all test-cuda test-peers support lint docs dist install

demo: install
	$(BIN)/l2l-prune demo

# Each process uses one thread, so that the two do not compete for cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Each process begins with one half, so that tests of a file share its fixtures; who is done first
# takes over from the other.
test: install
	$(PYTEST) --dist worksteal -m "not slow"

# Tests that kill processes, run whole commands, build the documentation or run every example.
test-slow: install
	$(PYTEST) -m slow

test-all: test test-slow

# Every feature on a GPU against the CPU in float64; DEVICE=cpu runs the same code without one.
test-cuda: install
	L2L_PRUNE_TEST_DEVICE=$(or $(DEVICE),cuda) $(BIN)/python -m pytest tests/cuda/test_cuda.py

# The hosts' own tests, with pruning attached. HIGHER=DIR adds the tests of a checkout of higher;
# CAVIA=DIR, METAOPTNET=DIR or LIBFEWSHOT=DIR runs the public scripts with the diffs in docs/guides/.
test-peers: install
	$(BIN)/python tests/peers/run.py $(if $(HIGHER),--higher $(HIGHER))
	$(BIN)/python tests/peers/published.py $(if $(CAVIA),--cavia $(CAVIA)) \
		$(if $(METAOPTNET),--metaoptnet $(METAOPTNET)) \
		$(if $(LIBFEWSHOT),--libfewshot $(LIBFEWSHOT))

# Writes docs/support.md from the test results.
support: install
	$(BIN)/python -m pytest -q -p tests.support_table --support-table docs/support.md \
		tests/hosts tests/metalearners/test_cavia.py tests/masking/test_masked_layer.py tests/masking/test_layers.py tests/reptile/test_distributed.py tests/reptile/test_task_masks.py \
		tests/shipping tests/test_examples.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: install
	$(BIN)/mkdocs build --strict

dist: install
	rm -rf $(DIST)
	$(BIN)/python -m build --outdir $(DIST)
	$(BIN)/twine check --strict $(DIST)/*

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	@# Older ones do not know the build option that learn2learn needs in a requirements file, newer
	@# ones refuse the metadata of its qpth.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=23.1,<24.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
