# `make demo` or `make test` on a fresh machine with Python is enough: the first run makes .venv and fills it.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test torture lint
demo: .venv/installed
	$(RUN) sample_joint.py
	$(RUN) train.py toy
	$(RUN) sample_joint.py out/toy --eval --n=64

test: .venv/installed
	$(RUN) -m pytest -q -n 2 --durations=15

# 2,000 damaged slides, in a minute
torture: .venv/installed
	$(RUN) tests/torture_slide.py

lint: .venv/installed
	$(RUN) -m ruff check .

# the stamp is written last, so that an install that was interrupted is done again
.venv/installed: requirements.lock
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -r requirements.lock
	touch $@
