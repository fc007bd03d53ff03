# `make demo` trains, evaluates and draws on the built-in data; `make test` runs the tests.
# Both create a private environment in .venv first, if there is none.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-slow check lock clean

demo: $(READY)
	$(BIN)/python tools/train.py configs/demo/detection.yaml
	$(BIN)/python tools/eval.py runs/demo/detection/model.safetensors
	$(BIN)/python tools/predict.py runs/demo/detection/model.safetensors data/shapes/*/images/val --out runs/demo/detection/predictions
	$(BIN)/python tools/train.py configs/demo/segmentation.yaml
	$(BIN)/python tools/eval.py runs/demo/segmentation/model.safetensors
	$(BIN)/python tools/predict.py runs/demo/segmentation/model.safetensors data/shapes/*/images/val --out runs/demo/segmentation/predictions

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off -e ".[test]" -c constraints.txt
	touch $@

# Needs uv; run after changing pyproject.toml.
lock:
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-emit-index-url --no-annotate -o constraints.txt

clean:
	rm -rf $(VENV) runs data/shapes
