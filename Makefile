# make demo, make test: all that a fresh machine needs is Python 3.11 or later, and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint bench claims docs wheel clean

demo: $(READY)
	$(BIN)/stillroom demo --out demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python bench/run.py

claims: $(READY)
	$(BIN)/stillroom claims run $$($(BIN)/stillroom claims list --names) --out src/stillroom/claims/results
	$(MAKE) docs

docs: $(READY)
	$(BIN)/stillroom claims docs --out docs/claims.md

wheel: $(READY)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist demo

# A second run finds the stamp and installs nothing.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stillroom needs Python 3.11 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lora,rae,track,onnx,dev]'
	@touch $(READY)
