# make demo    quantize the bundled example model with bundled conversations
# make test    the whole test suite
# make check   format, lint, types
# make format  rewrite the files as `make check` wants them
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/tiny-glm-NVFP4

.PHONY: demo test check format clean

# The stamp is newer than pyproject.toml and constraints.txt when everything is installed.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	rm -rf $(OUT)
	$(BIN)/fourge quantize examples/tiny-glm $(OUT) --recipe demo
	$(BIN)/fourge inspect $(OUT)

test: .venv/installed
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv out build dist .pytest_cache .ruff_cache
