# make demo       pre-train a once-for-all encoder on two CPU cores: table, figure, checkpoint;
#                 TEACHER=hubert_base, or what else pretrain.py --teacher takes, for another teacher;
#                 STEPS=1200 for as many steps as with MFCCs, where other teachers have 400
# make test       lint, and all tests, notebooks included, in two processes
# make data       fetch the embedded corpus alone (once, 50 MB): what the notebooks need
# make lint       formatter and linter
# make fuzz       property tests with 10,000 cases each, and 20 kills of a pre-training: 15 minutes
# make notebooks  execute the notebooks and keep what they print and draw
# make results    tables and figures of results/, from the points there (a minute)
# make sweep      pre-train all encoders and compute all points anew, into runs/results: some 31
#                 hours on one core; a stopped sweep goes on with the same command
# make benchmark  how fast this is, beside its goals (minutes; leave the machine alone meanwhile)
#
# All make .venv from requirements.txt (once, and again when that changes) and fetch the corpus.
# What the tests alone need is in tests/requirements.txt.
# Tests in a browser are run by hand: see tests/test_listen.py.
# RESULTS=FOLDER: where points go (runs/results unless told otherwise; with make results: results).

PYTHON ?= python3
TEACHER = mfcc
# Asking HuBERT Base takes as long as 900 steps, and all should take a quarter of an hour.
STEPS = $(if $(filter mfcc,$(TEACHER)),1200,400)
TASKS = pool ctc seq2seq
RESULTS = runs/results

# Encoders, by name. Those with -seed1, -seed2, … are pre-trained with these seeds.
OFA = ofa ofa-seed1 ofa-seed2
SEGMENTS = segments segments-seed1 segments-seed2 k3 k3-seed1 k3-seed2
PEERS = none none-seed1 none-seed2 none-seed3 none-seed4 \
	lam1.04 lam1.04-seed1 lam1.04-seed2 lam1.04-seed3 lam1.04-seed4 \
	average2 average4 lam0.51 lam0.78

# How each is pre-trained. Once-for-all may take the time of the six peers that it stands for. The
# last four are compared with each other: K = 1, 2, 3 values of λ a step take about equal time.
steps_ofa = --steps 9000
steps_segments = --steps 3000 --alpha segments
steps_k1 = --steps 5000 --lams-per-step 1
steps_k2 = --steps 3600 --lams-per-step 2
steps_k3 = --steps 3000
PEER_STEPS = --steps 3000
name_of = $(firstword $(subst -seed, ,$1))
seed_of = $(or $(word 2,$(subst -seed, ,$1)),0)
peer_of = $(if $(filter lam%,$1),--lam $(1:lam%=%),--compression $1)
recipe_of = $(or $(steps_$1),$(PEER_STEPS) $(call peer_of,$1))

# A teacher other than MFCCs has a folder of its own, so that --resume finds its own run there.
DEMO = runs/demo$(if $(filter-out mfcc,$(TEACHER)),-$(subst /,-,$(TEACHER)))

# Several small jobs side by side are faster than one with several threads.
ONE_THREAD = OMP_NUM_THREADS=1 .venv/bin/python
HEADS = --seeds 3 $(if $(filter seq2seq,$1),--epochs 40)
# A head for all rates of CTC learns for longer: for about the time of five heads of their own. So
# does one at a λ that was learned by differences, to be compared with it.
ANY_RATE = $(call HEADS,$1) $(if $(filter ctc,$1),--epochs 150)
FINETUNE = $(ONE_THREAD) finetune.py $(call HEADS,$1) --task $1
FINETUNE_ANY = $(ONE_THREAD) finetune.py $(call ANY_RATE,$1) --task $1 --lam any
PRICES_BY_loss = $(if $(filter pool,$1),0 0.03 0.1 0.3,0 0.3 1 3)
PRICES_BY_metric = 0 5 10 20
SEARCH = $(ONE_THREAD) adaptive_lambda.py $(call ANY_RATE,$1) --task $1 --way search
LEARN = $(ONE_THREAD) adaptive_lambda.py --task $1

demo: data/asterisk.pt
	@echo "== pre-training; a stopped run goes on with the same command"
	.venv/bin/python pretrain.py --teacher "$(TEACHER)" --steps $(STEPS) --out "$(DEMO)" --resume

test: data/asterisk.pt lint .venv/installed-for-tests
	.venv/bin/python -m pytest -n 2 --dist loadfile

data: data/asterisk.pt

lint: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

fuzz: data/asterisk.pt .venv/installed-for-tests
	.venv/bin/python -m pytest -s -m "hypothesis or fuzz" --hypothesis-profile=fuzz

notebooks: data/asterisk.pt
	.venv/bin/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.timeout=-1 notebooks/*.ipynb

benchmark: data/asterisk.pt
	.venv/bin/python -m extras.benchmark

results: RESULTS = results
results: data/asterisk.pt
	.venv/bin/python -m extras.firing checkpoints/ofa-tiny.pt $(RESULTS)/firing/ofa.json
	.venv/bin/python -m extras.firing checkpoints/segments-tiny.pt $(RESULTS)/firing/segments.json
	.venv/bin/python -m extras.claims $(RESULTS)
	.venv/bin/python -m extras.results $(RESULTS)

sweep: points-any points-ofa points-peers points-segments points-rivals \
		points-baselines points-learned points-slopes times
	$(MAKE) results RESULTS=$(RESULTS)

# One head for all rates, for each task and seed, and the best λ at several prices, by loss and by
# metric.
points-any: $(OFA:%=points-any-%)
points-any-%: runs/%/encoder.pt
	$(foreach task,$(TASKS),$(foreach by,loss metric,$(call SEARCH,$(task)) \
		--by $(by) --price $(call PRICES_BY_$(by),$(task)) \
		--checkpoint $< --out $(RESULTS)/$(*:ofa%=any%) &&)) true

# Heads of their own at each of five rates; and for characters, on the first of the encoders, some
# that learn for as long as a head for all rates, and some that emit three symbols a token.
points-ofa: $(OFA:%=points-own-%) runs/ofa/encoder.pt
	$(call FINETUNE,ctc) --epochs 150 --lam 0 0.78 \
		--checkpoint runs/ofa/encoder.pt --out $(RESULTS)/ofa-150
	$(call FINETUNE,ctc) --symbols-per-token 3 --lam 0.78 1.04 1.53 \
		--checkpoint runs/ofa/encoder.pt --out $(RESULTS)/slots
points-own-%: runs/%/encoder.pt
	$(foreach task,$(TASKS),$(call FINETUNE,$(task)) --lam 0 0.51 0.78 1.04 1.53 \
		--checkpoint $< --out $(RESULTS)/$* &&) true

# Each peer at its rate. A peer is named by its compression, or by its λ. Without compression also
# heads for characters that learn for as long as those for all rates.
points-peers: $(PEERS:%=points-peer-%)
points-peer-%: runs/%/encoder.pt
	$(foreach task,$(TASKS),$(call FINETUNE,$(task)) --checkpoint $< \
		--lam $(or $(patsubst lam%,%,$(filter lam%,$(call name_of,$*))),0) \
		--out $(RESULTS)/$* &&) true
	$(if $(filter none%,$*),$(call FINETUNE,ctc) --epochs 150 --checkpoint $< \
		--out $(RESULTS)/$(*:none%=none-150%))

# Tokens that end where segments end, those that it detects and, as an oracle, pseudo-boundaries;
# beside an encoder that had as many steps (k3); and K = 1, 2, 3.
points-segments: $(addprefix points-any-,$(SEGMENTS) k1 k2)
	$(foreach task,$(TASKS),$(call FINETUNE_ANY,$(task)) --boundaries pseudo \
		--checkpoint runs/segments/encoder.pt --out $(RESULTS)/segments-oracle &&) true

points-rivals: $(filter points-rivals-none%,$(PEERS:%=points-rivals-%))
points-rivals-%: runs/%/encoder.pt
	$(foreach task,$(TASKS),$(foreach by,average merge,$(call FINETUNE_ANY,$(task)) \
		--features $(by) --checkpoint $< --out $(RESULTS)/$(*:none%=rivals%) &&)) true

points-baselines: runs/ofa/encoder.pt
	$(foreach task,$(TASKS),\
		$(call FINETUNE,$(task)) --features logmel --out $(RESULTS)/baselines && \
		$(call FINETUNE,$(task)) --features random --checkpoint $< \
			--out $(RESULTS)/baselines &&) true
	$(call FINETUNE,seq2seq) --features deaf --out $(RESULTS)/baselines

# λ learned with a head, from three starts, in the paper's way and by differences.
points-learned: runs/ofa/encoder.pt
	$(foreach task,$(TASKS),\
		$(call LEARN,$(task)) $(call ANY_RATE,$(task)) --way differences \
			--checkpoint $< --out $(RESULTS)/learned-differences && \
		$(call LEARN,$(task)) $(call HEADS,$(task)) --way autograd \
			--checkpoint $< --out $(RESULTS)/learned-autograd &&) true

# What autograd sees of λ's slope, with one head for all rates.
points-slopes: runs/ofa/encoder.pt
	$(foreach task,$(TASKS),$(call FINETUNE_ANY,$(task)) --seeds 1 --save-heads \
		--checkpoint $< --out runs/slopes && $(ONE_THREAD) -m extras.slopes \
		runs/slopes/$(task)-any-seed0.pt $(RESULTS)/slopes/$(task).json &&) true

# How long each way takes to find a rate; leave the machine alone meanwhile.
times: data/asterisk.pt
	$(ONE_THREAD) -m extras.benchmark heads --repeats 3 --json $(RESULTS)/benchmark-heads.json

runs/%/encoder.pt: | data/asterisk.pt
	$(ONE_THREAD) pretrain.py --resume --out runs/$* --seed $(call seed_of,$*) \
		$(call recipe_of,$(call name_of,$*))
	mkdir -p $(RESULTS)/pretraining && cp runs/$*/table.json $(RESULTS)/pretraining/$*.json

data/asterisk.pt: | .venv/installed
	@echo "== fetching the embedded corpus into data/"
	.venv/bin/python -m parts.asterisk

.venv/installed: requirements.txt
	@echo "== installing requirements.txt into .venv (torch is large: a few minutes)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/installed-for-tests: tests/requirements.txt .venv/installed
	@echo "== installing tests/requirements.txt into .venv"
	.venv/bin/python -m pip install --quiet -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .pytest_cache .hypothesis .ruff_cache __pycache__ */__pycache__

.PHONY: demo test data lint fuzz notebooks benchmark results sweep clean
.SECONDARY:
.DELETE_ON_ERROR:
