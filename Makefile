# make demo       pre-train a once-for-all encoder on two CPU cores: table, figure, checkpoint in runs/demo
# make test       all tests
# make fuzz       the property tests with 10,000 cases each (1,000 where a case takes long), and 20 kills of a pre-training: a quarter of an hour
# make notebooks  execute the notebooks and keep what they print and draw
# make results    tables and figures of results/, from the points there (a minute)
# make sweep      pre-train the peers and compute all points anew, into runs/results (some eight hours on one core, half of it with -j2);
#                 a stopped sweep goes on with the same command; RESULTS=FOLDER takes another folder, here and for make results
# make benchmark  how fast this is, beside its goals: tables, and runs/benchmark.json (some minutes; leave the machine alone meanwhile)
# All make .venv from requirements.txt (once, and again when that changes) and fetch the embedded corpus (once, 50 MB).

PYTHON ?= python3
PEERS = none average2 average4 lam0.51 lam0.78 lam1.04
TASKS = pool ctc seq2seq
FINETUNE = OMP_NUM_THREADS=1 .venv/bin/python finetune.py --seeds 3
RESULTS = results
OFA = --checkpoint checkpoints/ofa-tiny.pt

demo: data/asterisk.pt
	@echo "== pre-training; a stopped run goes on with the same command"
	.venv/bin/python pretrain.py --out runs/demo --resume

test: data/asterisk.pt
	.venv/bin/python -m pytest

fuzz: data/asterisk.pt
	.venv/bin/python -m pytest -s -m "hypothesis or fuzz" --hypothesis-profile=fuzz

notebooks: data/asterisk.pt
	.venv/bin/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

benchmark: data/asterisk.pt
	.venv/bin/python -m extras.benchmark

results: data/asterisk.pt
	.venv/bin/python -m extras.firing checkpoints/ofa-tiny.pt $(RESULTS)/firing.json
	.venv/bin/python -m extras.results $(RESULTS)

sweep: RESULTS = runs/results
sweep: points-ofa $(PEERS:%=points-%) points-baselines points-adaptive
	$(MAKE) results RESULTS=$(RESULTS)

points-ofa: data/asterisk.pt
	for task in $(TASKS); do $(FINETUNE) $(OFA) --task $$task --lam 0 0.51 0.78 1.04 1.53 --out $(RESULTS)/ofa || exit 1; done
	$(FINETUNE) $(OFA) --task ctc --symbols-per-token 3 --lam 0.78 1.04 1.53 --out $(RESULTS)/slots

points-baselines: data/asterisk.pt
	for task in $(TASKS); do $(FINETUNE) --features logmel --task $$task --out $(RESULTS)/baselines || exit 1; done
	for task in $(TASKS); do $(FINETUNE) --features random $(OFA) --task $$task --out $(RESULTS)/baselines || exit 1; done
	$(FINETUNE) --features deaf --task seq2seq --out $(RESULTS)/baselines

LEARN = OMP_NUM_THREADS=1 .venv/bin/python adaptive_lambda.py $(OFA) --out $(RESULTS)/adaptive
points-adaptive: data/asterisk.pt
	for task in $(TASKS); do $(LEARN) --task $$task --seeds 3 || exit 1; done
	for price in 0.3 1 3; do $(LEARN) --task ctc --lam 0.6 --price $$price || exit 1; done
	for price in 0.01 0.03 0.1; do $(LEARN) --task pool --lam 0.6 --price $$price || exit 1; done
	$(LEARN) --task ctc --lam 1.2 --hide-missing && $(LEARN) --task ctc --lam 0.1 1.2 --jitter 0.15

# A peer is named by its compression, or by its λ.
points-%: runs/%/encoder.pt
	for task in $(TASKS); do $(FINETUNE) --checkpoint $< --task $$task --lam $(if $(filter lam%,$*),$(*:lam%=%),0) --out $(RESULTS)/$* || exit 1; done

runs/%/encoder.pt: | data/asterisk.pt
	OMP_NUM_THREADS=1 .venv/bin/python pretrain.py --steps 3000 --resume $(if $(filter lam%,$*),--lam $(*:lam%=%),--compression $*) --out runs/$*
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
	rm -rf .pytest_cache .hypothesis __pycache__ */__pycache__

.PHONY: demo test fuzz notebooks benchmark results sweep clean
.SECONDARY:
