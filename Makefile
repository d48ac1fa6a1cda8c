# make demo [TASK=docvqa|hateful_memes|nlvr2|ucf101]   finetune the embedded tiny checkpoint on sample data drawn on the spot
# make test                                             everything, as in CI;  make quick: without the slow tests
# make lint | format                                    ruff
# make matrix                                           methods × tasks on the embedded samples, into results/embedded.md
# make bench-table                                      benchmarks/results/ into docs/performance.md

PYTHON ?= python3
CHECK_PYTHON = import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("error: this needs Python 3.11 to 3.13, and \
$(PYTHON) is " + sys.version.split()[0] + ": name another, make demo PYTHON=python3.12 say")
TASK ?= docvqa
BIN = .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false
# Two workers share the cores: more threads each would only wait for each other.
test quick: export OMP_NUM_THREADS = 1

.PHONY: demo test quick lint format matrix bench-table

# torch goes first, by itself: DeepSpeed's build looks for it. For a GPU it would ask for CUDA's compiler, which nothing needs.
.venv/installed: requirements.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.txt)" setuptools wheel
	DS_IGNORE_CUDA_DETECTION=1 $(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/installed
	$(BIN)/python -m tools.embedded $(TASK)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/python -m pytest -q -rs --durations=25 -n 2 --dist loadfile

quick: .venv/installed
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

matrix: .venv/installed
	$(BIN)/python -m tools.matrix

bench-table: .venv/installed
	$(BIN)/python -m benchmarks.table
