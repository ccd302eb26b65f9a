# Needs Python 3.11 or newer, git, gcc and make; everything else goes into .venv, which the first target makes.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
READY := .venv/.ready
TEST_READY := .venv/.ready-test
RATINGS := data/vaderSentiment-3.3.2.tar.gz

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' Makefile

demo: $(READY) $(RATINGS)  ## pretrain, learn a reward from human ratings, run PPO, report (about 10 minutes)
	@$(BIN)/rlhf run examples/movies.toml

test: $(RATINGS) $(TEST_READY)  ## run the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile

bench: $(TEST_READY)  ## time operations and training steps beside their rivals; a report with pictures (9 minutes)
	@$(BIN)/rlhf bench --quick --minutes 9

lint: $(READY) $(RATINGS)  ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove what make made: .venv, the downloaded ratings, builds and caches (runs/ stays)
	rm -rf .venv data build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find rlhf_kernels rlhf_engine plugins tests bench examples -name __pycache__ -prune -exec rm -rf {} +

$(READY): requirements.lock setup.py pyproject.toml
	@command -v $(PYTHON) > /dev/null || { \
	    echo "There is no '$(PYTHON)' on the path. Install Python 3.11 or newer, or say: make PYTHON=<yours>"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed. Say: make PYTHON=<yours>"; exit 1; }
	@echo "set-up 1/3: a virtual environment in .venv (seconds)"
	@$(PYTHON) -m venv .venv
	@echo "set-up 2/3: the packages of requirements.lock (2 to 10 minutes the first time, mostly torch)"
	@$(PIP) install -r requirements.lock
	@echo "set-up 3/3: this project, editable (seconds)"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# The human ratings are only in the source distribution, not in the wheel.
$(RATINGS): | $(READY)
	@echo "set-up: the human ratings, 2.5 MB into data/ (seconds)"
	@$(PIP) download --no-deps --no-build-isolation --no-binary vaderSentiment --dest data vaderSentiment==3.3.2
	@test -f $@ || { echo "The download left no $@ but: $$(ls data). Fetch vaderSentiment 3.3.2 anew."; exit 1; }

$(TEST_READY): requirements-test.lock $(READY)
	@echo "set-up: the trainers, trackers and libraries that we are tested with (a minute)"
	@$(PIP) install --requirement requirements.lock --requirement requirements-test.lock
	@touch $@
