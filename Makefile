# make quickstart   prepare a dataset, train a GPT on it, and print what it writes
# make test         the default tests, which need neither a GPU nor a network
# make test-slow    the slow ones
# make check        formatting, lint and types
# make clean        remove the environment and the quickstart's dataset

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: quickstart test test-slow check clean

quickstart: data/stdlib_bpe/meta.json
	$(PY) train.py config/quickstart.toml

data/stdlib_bpe/meta.json: | $(VENV)/installed
	$(PY) -m data.prepare stdlib --tokenizer=bpe --vocab_size=4096

test: $(VENV)/installed-dev
	$(PY) -m pytest -n auto

test-slow: $(VENV)/installed-dev
	$(PY) -m pytest -n auto -m slow

check: $(VENV)/installed-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright

clean:
	rm -rf $(VENV) data/stdlib_bpe

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/installed
