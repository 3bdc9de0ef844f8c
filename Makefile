# Two commands do all on a fresh machine with Python 3.11+ and make:
#   make demo    the whole cycle on built-in data
#   make test    the quick test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
DATA   ?= digits

export OMP_NUM_THREADS = 1
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0

.DEFAULT_GOAL := help

.PHONY: help env lock proto demo test lint test-slow chaos simulate bench bench-sim bench-wire bench-step clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.made ## build the environment from the pinned versions

$(VENV)/.made: pyproject.toml deploy/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/deploy/constraints.txt \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

lock: env ## write the installed versions into deploy/constraints.txt
	{ echo '# Every version that the environment is built with (make env). Made by: make lock'; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; \
	  grep '^setuptools==' deploy/constraints.txt; } > deploy/constraints.new
	mv deploy/constraints.new deploy/constraints.txt

proto: env ## generate the code of common/collect.proto anew
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
	  common/collect.proto

demo: env ## the whole cycle on built-in images, under five minutes (OUT=folder)
	rm -rf $(OUT)
	@# One of the devices' 110 held-out images is almost a point here: the usual half a point
	@# would be decided by chance. So few images are learnt best by class statistics, and by default
	@# they are; what is to be seen here is how the net grows.
	$(BIN)/fallow simulate --data digits --net resnet8 --width 32 --steps 2 --devices 4 --rounds 5 \
	  --prior-size 300 --calibration digits --set max-drop=0.025 --set accept-drop=0.01 \
	  --set statistics-images=0 --out $(OUT)

test: env lint ## types, style and the quick tests
	$(BIN)/python -m pytest -q -m 'not slow and not chaos'

lint: env ## types and style alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: env ## the tests that take minutes: Ray, and real server and device processes
	$(BIN)/python -m pytest -q -m 'slow and not chaos'

chaos: env ## faults at length: kills, full disks, fuzzed and hostile updates
	$(BIN)/python -m pytest -q -m chaos

simulate: env ## the same through `flwr run` on Ray (DATA=digits or a path)
	PATH="$(abspath $(BIN)):$$PATH" deploy/flwr-run.sh $(OUT)-flower $(DATA)

bench: env ## reproduce the tables of the README (DATA=folder with CIFAR-10; half an hour)
	$(BIN)/python tests/bench/main_job.py --case four-steps
	$(BIN)/python tests/bench/main_job.py --case two-steps --data $(DATA)

bench-sim: env ## simulation against Ray and pfl, and by the number of devices (half an hour)
	$(BIN)/python tests/bench/simulation.py

bench-wire: env ## bytes of a step on a real SuperLink against dense FedAvg (half an hour)
	$(BIN)/python tests/bench/wire.py

bench-step: env ## time and memory of a device's training step, as ratios (ten minutes)
	$(BIN)/python tests/bench/step.py

clean: ## remove what was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
