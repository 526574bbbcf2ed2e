# make demo   pre-train a once-for-all encoder on two CPU cores: table, figure, checkpoint in runs/demo
# make test   all tests
# Both make .venv from requirements.txt (once, and again when that changes) and fetch the embedded corpus (once, 50 MB).

PYTHON ?= python3

demo: data/asterisk.pt
	@echo "== pre-training; a stopped run goes on with the same command"
	.venv/bin/python pretrain.py --out runs/demo --resume

test: data/asterisk.pt
	.venv/bin/python -m pytest

data/asterisk.pt: | .venv/installed
	@echo "== fetching the embedded corpus into data/"
	.venv/bin/python asterisk.py

.venv/installed: requirements.txt
	@echo "== installing requirements.txt into .venv (torch is large: a few minutes)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

clean:
	rm -rf .pytest_cache .hypothesis __pycache__ */__pycache__

.PHONY: demo test clean
