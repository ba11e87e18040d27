PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: quickstart test test-all check fuzz clean

# Packages, synthetic stories, a vocabulary, some minutes of training, and three samples.
quickstart: $(VENV)/installed
	$(RUN) tinystories.py synthesize
	$(RUN) tinystories.py pretokenize config/quickstart_data.py
	$(RUN) train.py config/quickstart.py
	$(RUN) sample.py --num_samples=3 --temperature=0.8 --top_p=0.95 --start="Once upon a time"

# The checks and all tests but the slow ones: up to 5 minutes on two cores.
test: check
	$(RUN) -m pytest -n 2 -m "not slow"

# The checks and all tests: up to 12 minutes on two cores.
test-all: check
	$(RUN) -m pytest -n 2

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .

# 10,000 damaged files for each reader of a format.
fuzz: $(VENV)/installed-dev
	$(RUN) -m tests.tools.fuzz --files=10000

$(VENV)/installed: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'cria needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
