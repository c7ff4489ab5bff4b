# Everything sets itself up in .venv. TORCH may name another build, say one for your CUDA version.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
QUANTIZERS := $(VENV)/quantizers

.PHONY: demo test test-quantized lint bench bench-gpu demo-clean clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

demo: $(INSTALLED)  ## the main job end to end: train a small LLaMA, widen it, verify, fine-tune, draw
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-quantized: $(INSTALLED)  ## the tests of quantised bases, with quantisers that nothing else needs beside the environment
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(QUANTIZERS) "torchao>=0.18" "bitsandbytes>=0.50"
	PYTHONPATH=$(QUANTIZERS) $(BIN)/python -m pytest tests/modeling/test_quantized.py tests/training/test_quantized.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## a site beside its peers, a widened model beside its base
	$(BIN)/python benchmarks/bench_ops.py
	$(BIN)/python benchmarks/bench_model.py

bench-gpu: $(INSTALLED)  ## everything that is claimed of a GPU, measured and judged
	$(BIN)/python benchmarks/measure_gpu.py

demo-clean:
	rm -rf demo

clean: demo-clean
	rm -rf $(VENV)
