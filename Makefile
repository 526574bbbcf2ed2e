# make demo       pre-train a once-for-all encoder on two CPU cores: table, figure, checkpoint
# make test       lint, and all tests, notebooks included
# make data       fetch the embedded corpus alone (once, 50 MB): what the notebooks need
# make lint       formatter and linter
# make fuzz       property tests with 10,000 cases each, and 20 kills of a pre-training: 15 minutes
# make notebooks  execute the notebooks and keep what they print and draw
# make results    tables and figures of results/, from the points there (a minute)
# make sweep      pre-train the peers and compute all points anew, into runs/results: some eight
#                 hours on one core; a stopped sweep goes on with the same command
# make benchmark  how fast this is, beside its goals (minutes; leave the machine alone meanwhile)
#
# All make .venv from requirements.txt (once, and again when that changes) and fetch the corpus.
# RESULTS=FOLDER takes another folder for sweep and results.

PYTHON ?= python3
PEERS = none average2 average4 lam0.51 lam0.78 lam1.04
TASKS = pool ctc seq2seq
RESULTS = results
OFA = --checkpoint checkpoints/ofa-tiny.pt

# Several small jobs side by side are faster than one with several threads.
ONE_THREAD = OMP_NUM_THREADS=1 .venv/bin/python
FINETUNE = $(ONE_THREAD) finetune.py --seeds 3
LEARN = $(ONE_THREAD) adaptive_lambda.py $(OFA) --out $(RESULTS)/adaptive

demo: data/asterisk.pt
	@echo "== pre-training; a stopped run goes on with the same command"
	.venv/bin/python pretrain.py --out runs/demo --resume

test: data/asterisk.pt lint
	.venv/bin/python -m pytest

data: data/asterisk.pt

lint: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

fuzz: data/asterisk.pt
	.venv/bin/python -m pytest -s -m "hypothesis or fuzz" --hypothesis-profile=fuzz

notebooks: data/asterisk.pt
	.venv/bin/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.timeout=-1 notebooks/*.ipynb

benchmark: data/asterisk.pt
	.venv/bin/python -m extras.benchmark

results: data/asterisk.pt
	.venv/bin/python -m extras.firing checkpoints/ofa-tiny.pt $(RESULTS)/firing/ofa.json
	.venv/bin/python -m extras.results $(RESULTS)

sweep: RESULTS = runs/results
sweep: points-ofa $(PEERS:%=points-%) points-baselines points-adaptive
	$(MAKE) results RESULTS=$(RESULTS)

points-ofa: data/asterisk.pt
	for task in $(TASKS); do \
		$(FINETUNE) $(OFA) --task $$task --lam 0 0.51 0.78 1.04 1.53 \
			--out $(RESULTS)/ofa || exit 1; \
	done
	$(FINETUNE) $(OFA) --task ctc --symbols-per-token 3 --lam 0.78 1.04 1.53 \
		--out $(RESULTS)/slots

points-baselines: data/asterisk.pt
	for task in $(TASKS); do \
		$(FINETUNE) --features logmel --task $$task --out $(RESULTS)/baselines && \
		$(FINETUNE) --features random $(OFA) --task $$task --out $(RESULTS)/baselines \
			|| exit 1; \
	done
	$(FINETUNE) --features deaf --task seq2seq --out $(RESULTS)/baselines

points-adaptive: data/asterisk.pt
	for task in $(TASKS); do $(LEARN) --task $$task --seeds 3 || exit 1; done
	for price in 0.3 1 3; do \
		$(LEARN) --task ctc --lam 0.6 --price $$price || exit 1; \
	done
	for price in 0.01 0.03 0.1; do \
		$(LEARN) --task pool --lam 0.6 --price $$price || exit 1; \
	done

# A peer is named by its compression, or by its λ.
points-%: runs/%/encoder.pt
	for task in $(TASKS); do \
		$(FINETUNE) --checkpoint $< --task $$task \
			--lam $(if $(filter lam%,$*),$(*:lam%=%),0) --out $(RESULTS)/$* || exit 1; \
	done

runs/%/encoder.pt: | data/asterisk.pt
	$(ONE_THREAD) pretrain.py --steps 3000 --resume --out runs/$* \
		$(if $(filter lam%,$*),--lam $(*:lam%=%),--compression $*)
	mkdir -p $(RESULTS)/pretraining && cp runs/$*/table.json $(RESULTS)/pretraining/$*.json

data/asterisk.pt: | .venv/installed
	@echo "== fetching the embedded corpus into data/"
	.venv/bin/python -m parts.asterisk

.venv/installed: requirements.txt
	@echo "== installing requirements.txt into .venv (torch is large: a few minutes)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

clean:
	rm -rf .pytest_cache .hypothesis .ruff_cache __pycache__ */__pycache__

.PHONY: demo test data lint fuzz notebooks benchmark results sweep clean
.SECONDARY:
