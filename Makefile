# make demo   a finished study with its report, from nothing but Python and make
# make test   lint, types and tests; make check: lint, types and unit tests only; make test-long: tests of rare accidents
# make fuzz   10,000 damaged inputs of everything that is read; make chaos: 100 faults in real runs, each carried to its end
# make bench  speed and memory beside their targets, in half an hour on 2 cores; make bench-gpu: the same of a GPU
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   ?= runs
DATA   ?= $(wildcard ../shared/data)

export OMP_NUM_THREADS ?= 1
export SOFTSEG_TEST_DATA ?= $(if $(DATA),$(abspath $(DATA)))

unexport PYTHONDONTWRITEBYTECODE  # every process would compile all modules again

.PHONY: demo test test-long fuzz chaos check types units bench bench-gpu lock clean

BENCHMARKS := $(sort $(wildcard tests/benchmarks/bench_*.py))
ON_GPU     := $(filter tests/benchmarks/bench_gpu%,$(BENCHMARKS))

# The environment is made again only when the lock or the project's own needs change.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "Installing into $(VENV): a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(VENV)/.ready
	@$(BIN)/softseg run studies/s001_quickstart.py --out $(RUNS)

test: check
	$(BIN)/python -m pytest -m "gpu or engine and not timed and not long" --numprocesses 2 --dist loadfile tests
	$(BIN)/python -m pytest -m "engine and timed" tests

test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -m long --numprocesses 2 --dist loadfile tests

# 10,000 damaged inputs, in some minutes; the counts are in fuzz.json. To show them in docs/faults.md: see tests/fuzz/fuzzer.py
fuzz: $(VENV)/.ready
	$(BIN)/python tests/fuzz/fuzzer.py --inputs 10000 --seed 0

# 100 faults, two at a time, in 45 minutes; each and its end are in chaos.json. To show them in docs/faults.md: see tests/chaos/chaos.py
chaos: $(VENV)/.ready
	$(BIN)/python tests/chaos/chaos.py --faults 100 --seed 0

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs 2 --output-sync types units

types:
	$(BIN)/mypy

units:
	$(BIN)/python -m pytest -m "not engine" --numprocesses 2 --dist loadfile tests/unit softseg_dist

bench: $(VENV)/.ready
	@for file in $(filter-out $(ON_GPU),$(BENCHMARKS)); do echo; echo "$$file"; $(BIN)/python $$file || failed="$$failed $$file"; done; \
	echo; $(BIN)/python tests/benchmarks/summary.py; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# A machine that has torch and MONAI needs no environment, and no Ray: make bench-gpu BIN=/usr/bin
bench-gpu: $(if $(filter command line,$(origin BIN)),,$(VENV)/.ready)
	@for file in $(ON_GPU); do echo "$$file"; PYTHONPATH=$(CURDIR) $(BIN)/python $$file || exit 1; done
	@$(BIN)/python tests/benchmarks/summary.py

lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet --disable-pip-version-check pip-tools
	echo "torch==2.13.0" > $(VENV)-lock/torch.txt
	$(VENV)-lock/bin/pip-compile --quiet --strip-extras --extra dev --constraint $(VENV)-lock/torch.txt --no-emit-index-url \
	    --no-emit-find-links --no-header --no-annotate --output-file requirements.lock pyproject.toml
	sed -i -e 's/^torch==.*/torch==2.13.0/' -e '/^#/d' requirements.lock  # without the local label of the build at hand
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
