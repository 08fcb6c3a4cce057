# make demo    quantize, examine, evaluate, report and serve the bundled example model
# make test    the whole test suite
# make check   format, lint, types
# make format  rewrite the files as `make check` wants them
PYTHON ?= python3
BIN := .venv/bin
SOURCE := examples/tiny-glm
OUT ?= out/tiny-glm-NVFP4
# Conversations that the calibration has not seen; a part of them, for a demonstration.
HELD_OUT := $(foreach kind,coding broad deep,--data examples/evaluation/$(kind).jsonl)

.PHONY: demo test check format clean

# The stamp is newer than pyproject.toml and constraints.txt when everything is installed.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	rm -rf $(OUT)
	$(BIN)/fourge quantize $(SOURCE) $(OUT) --recipe demo
	$(BIN)/fourge doctor $(OUT) --source $(SOURCE) --record
	$(BIN)/fourge evaluate $(OUT) --reference $(SOURCE) $(HELD_OUT) --tokens 24576
	$(BIN)/fourge report $(OUT)
	$(BIN)/python examples/talk.py $(OUT)

# Two workers with one thread each, or they wait for each other's; the tests of a file stay together,
# since they share what its fixtures make.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv out build dist .pytest_cache .ruff_cache
