# `make demo` and `make test` need nothing but make and Python 3.11 or 3.12; they install into ./.venv.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

# The first interpreter that starts and has a supported version; the CPU wheel of torch may exist for one of them only.
PYTHON := $(shell for p in $(PYTHON_BINARY) python3.11 python3.12 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: demo test test-slow test-long soak evidence case-study check check-model install bench clean help

help:
	@echo "make demo    three hospitals train with differential privacy, then one image is diagnosed under encryption"
	@echo "make test    the tests"
	@echo "make test-slow   faults in every phase of every role, several minutes more"
	@echo "make test-long   sweeps: a party frozen or lost at every message; most of an hour"
	@echo "make soak    breaks real runs at random for an hour"
	@echo "make evidence   attacks updates, audits privacy of honest runs, and what marked phantoms teach; over an hour"
	@echo "make case-study DATA=DIR OUT=OUT   the case study on real X-rays, under two hours on two cores"
	@echo "make check   format, lint, types and layers"
	@echo "make check-model   rounds among peers, by Spin (apt-get install spin gcc)"
	@echo "make clean   remove the environment and the demo's results"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard mpc_fl/inference/fast/kernels/native/*.[ch])
	@test -n "$(PYTHON)" || { echo "mpc-fl needs Python 3.11 or 3.12 on the path" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a minute or two) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0 'setuptools>=70'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@rm -rf $(DEMO) $(DEMO)-diagnosis $(DEMO).failed $(DEMO)-diagnosis.failed $(DEMO).partial $(DEMO)-diagnosis.partial
	$(BIN)/mpc-fl train configs/demo.yaml --out $(DEMO)
	$(BIN)/mpc-fl infer configs/demo.yaml --model $(DEMO)/model.safetensors --out $(DEMO)-diagnosis --set inference.plaintext_reference=true
	@echo
	@echo "Training report:  $(CURDIR)/$(DEMO)/report.html"
	@echo "Diagnosis report: $(CURDIR)/$(DEMO)-diagnosis/report.html"

# All processes of the tests share the cores: one thread each, and modules are compiled once for all of them.
PYTEST := PYTHONDONTWRITEBYTECODE= OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile

test: $(STAMP)
	$(PYTEST) -m "not slow and not long"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not long"

test-long: $(STAMP)
	$(PYTEST) -m long

# What to do instead of an hour: `make soak SOAK="--injections 200 --seed 1"`; `python -m tests.soak --help` lists it all.
SOAK := --minutes 60

soak: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.soak $(SOAK)

evidence: $(STAMP)
	$(BIN)/python benchmarks/gradient_inversion.py
	$(BIN)/python benchmarks/privacy_audit.py $(EVIDENCE)
	$(BIN)/python benchmarks/shortcuts.py

case-study: $(STAMP)
	$(BIN)/python examples/case_study --data $(DATA) --out $(or $(OUT),runs/case_study)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check-model: $(STAMP)
	@command -v spin >/dev/null || { echo "check-model needs Spin: apt-get install spin gcc" >&2; exit 1; }
	$(BIN)/python models/check.py --seconds 300

clean:
	rm -rf $(VENV) $(DEMO) $(DEMO)-diagnosis build *.egg-info
