# make demo: from nothing to a short conversation with a model of your own.   make test: the test suite.
# make check: what a developer runs before a commit.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

# 1,700 iterations take six to seven minutes on two CPU cores with AMX, twice that without. Without a terminal to ask on, train.py takes the best device.
demo: $(VENV)/.installed
	$(BIN)/python data/prepare-chitchat.py
	$(BIN)/python train.py --dataset chitchat --preset tiny --max_iters 1700 \
		--learning_rate 2e-3 --min_lr 6e-5 --eval_iters 10 < /dev/null
	@echo
	@$(BIN)/python testing_tools/scripted_chat.py models/chitchat1700.pt
	@echo
	@echo "Talk to it yourself:       $(BIN)/python gen.py --chat"
	@echo "Train it on stories next:  $(BIN)/python data/prepare-story.py && $(BIN)/python train.py"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest
