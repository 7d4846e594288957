# Run `make` to list the commands. Every command installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# In two processes. Their OpenMP threads sleep while they wait, because they would spin at each other's expense.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock

.DEFAULT_GOAL := help
.PHONY: help demo data test check lint format types lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.installed: requirements.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PIP_INSTALL) -r requirements-dev.txt
	touch $@

# A vocabulary of 1,024 ids, learned from 5,000 conversations in seconds.
data/talk-tokenizer.json: | $(VENV)/.installed
	$(BIN)/python data/prepare-chitchat.py --conversations 5000
	$(BIN)/python data/train-tokenizer.py --input data/chitchat-train.jsonl --vocab_size 1024 --name talk \
		--source data/chitchat --licence MIT

# The redirection from /dev/null keeps train.py from asking which GPU to use; it chooses the one with the most free memory.
demo: data/talk-tokenizer.json $(VENV)/.installed ## train a small chat model from scratch and talk to it
	$(BIN)/python data/prepare-chitchat.py --tokenizer talk
	$(BIN)/python train.py --dataset chitchat --preset tiny --block_size 512 --batch_size 8 --max_iters 1500 \
		--learning_rate 3e-3 --min_lr 6e-5 --eval_iters 10 < /dev/null
	@echo
	@$(BIN)/python testing_tools/scripted_chat.py models/chitchat1500.pt
	@echo
	@$(BIN)/python testing_tools/chat_eval.py models/chitchat1500.pt --summary
	@echo
	@echo "Talk to it yourself:       $(BIN)/python gen.py --chat"
	@echo "Or in a browser:           $(BIN)/python serve.py"
	@echo "Teach it your own talk:    docs/fine-tuning.md"

data: $(VENV)/.installed ## download and prepare every data set (4 GB), and say what is missing
	$(BIN)/python data/prepare-all.py

test: $(VENV)/.installed-dev ## run the tests
	$(PYTEST)

lint: $(VENV)/.installed-dev ## report suspicious code and misplaced imports
	$(BIN)/ruff check .

format: $(VENV)/.installed-dev ## format the code and fix what can be fixed automatically
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev ## check the types
	$(BIN)/mypy

check: lint ## run everything that CI runs: lint, format, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

lock: $(VENV)/.installed-dev ## update requirements.lock after changing a requirements file
	$(BIN)/python .ci/make_lock.py

clean: ## remove caches and temporary files; data, models and .venv stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.tmp' \) -print0 | xargs -0 rm -rf
