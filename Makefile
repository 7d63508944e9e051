# Every target sets up its own virtual environment if it is not there: with uv where uv is installed, with venv and pip elsewhere.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= results/demo
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: demo figures docs test test-all test-more test-slow lint format clean

demo: $(VENV)/experiments.stamp  ## select the hyperparameters of a logistic regression, and write a figure
	$(BIN)/python -m experiments.hyperparameter_selection --dataset breast_cancer --out $(OUT) --overwrite

figures: $(VENV)/experiments.stamp  ## every figure at the size of a laptop; goes on where it was stopped
	$(BIN)/python -m experiments.reproduce --out results/figures

docs: $(VENV)/docs.stamp  ## the documentation site, in results/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir results/site

test: $(VENV)/test.stamp  ## every property, on one solver of each kind; file by file on two processes of about 4 GB each
	$(PYTEST)

test-all: $(VENV)/test.stamp  ## every property on every solver: all tests but the slow ones
	$(PYTEST) -m 'not slow'

test-more: $(VENV)/test.stamp  ## what test-all runs and test does not
	$(PYTEST) -m 'more and not slow'

test-slow: $(VENV)/test.stamp  ## tests that take minutes each
	$(PYTEST) -m slow

lint: $(VENV)/lint.stamp  ## style and types of the whole tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) results .pytest_cache .ruff_cache

# One stamp per extra: experiments < test < lint, and docs < lint, each installed only when it is asked for.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	if command -v uv >/dev/null 2>&1; then \
		uv pip install --quiet --python $(BIN)/python --editable '.[$*]'; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'; \
	fi
	touch $@

$(BIN)/python:
	if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --python $(PYTHON) $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV); \
	fi
