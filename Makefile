# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint docs package compatibility clean

demo: $(VENV)/.package
	$(BIN)/shadowpeft demo --output runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/pyright

# Strict: a link that leads nowhere or a page outside the navigation fails.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet --site-dir site

# Wheel and sdist, and the wheel alone in an empty environment: what is not in it is missed there.
package: $(VENV)/.package
	$(PIP) build
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && empty/bin/shadowpeft info
	cd build && empty/bin/shadowpeft train --output run --max-steps 1 --batch-size 2 --max-length 32 --limit-train 8 --limit-eval 2

# An environment for each cell, one after the other: hours on two cores. ONLY="3.11 torch=2.8.0" runs some.
compatibility: $(VENV)/.package
	$(BIN)/python scripts/compatibility.py $(if $(ONLY),--only $(ONLY))

# torch first: a plain range could pull another build than the one the tests were written against.
$(VENV)/.package: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

# shadow-peft pins nothing we need; without --no-deps it would bring its training stack.
$(VENV)/.tests: $(VENV)/.package
	$(PIP) --editable '.[test,export,serve,docs]'
	$(PIP) --no-deps shadow-peft==0.1.1
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site
