# Everything sets itself up: a clean clone, Python 3.11 or newer and make are enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export UV_LINK_MODE := hardlink
# folders of large photographs, such as those of Debian's lomiri-wallpapers and plasma-workspace-wallpapers
PHOTOS ?= /usr/share/backgrounds /usr/share/wallpapers

# the version that benchmarks/robustness.py compares this one with
OLD ?= HEAD

PEERS_READY := .peers/.ready

TRITON_READY := .venv-triton/.ready

.PHONY: setup demo test chromium check format docs evidence peers gpu clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt pip --editable '.[export,train]' --group dev
	touch $(READY)

demo: setup
	$(BIN)/mio quickstart

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# two processes of one thread each; a file, or the group of files that need the machine, stays in one of them
test: check chromium $(TRITON_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup
	$(BIN)/python scripts/check_wheel.py

# the tests of pages run in a browser
chromium:
	@command -v chromium > /dev/null \
	    || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } \
	    || { echo "make: the tests of pages need chromium on the PATH; install it (Debian: sudo apt-get install chromium)" >&2; exit 1; }

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the site, in an environment of its own, as site/; a broken link is an error
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict

.venv-docs/.ready: docs/requirements.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	touch .venv-docs/.ready

# other tools that benchmarks compare with, in an environment of their own; later ones of perf_analyzer need glibc 2.38
peers: setup $(PEERS_READY)

$(PEERS_READY): benchmarks/peers/requirements.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .peers
	$(BIN)/uv pip install --quiet --compile-bytecode --python .peers/bin/python --requirement benchmarks/peers/requirements.txt
	$(BIN)/uv pip install --quiet --no-deps --python .peers/bin/python tritonclient==2.50.0
	touch $(PEERS_READY)

# a Triton and its stock client, for tests and benchmarks only: they need numpy 1, all else is as in .venv
$(TRITON_READY): $(READY) constraints-triton.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-triton
	sed 's/==.*//; s/^/^/; s/$$/==/' constraints-triton.txt | grep --invert-match --file - constraints.txt > .venv-triton/constraints.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-triton/bin/python \
	    --constraint .venv-triton/constraints.txt --constraint constraints-triton.txt \
	    nvidia-pytriton 'tritonclient[grpc,http]' onnxruntime pillow pillow-heif
	touch $(TRITON_READY)

evidence: setup peers $(TRITON_READY)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/objective_cost.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/quickstart.py
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/truncation.py
	$(BIN)/python benchmarks/objectives_search.py
	$(BIN)/python benchmarks/objectives.py
	$(BIN)/python benchmarks/gate.py
	$(BIN)/python benchmarks/runtimes.py --photos $(PHOTOS)
	$(BIN)/python benchmarks/embedding.py --photos $(PHOTOS)
	$(BIN)/python benchmarks/robustness.py --old $(OLD)
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/serving_faults.py

gpu: setup
	$(BIN)/python -m pytest -m gpu -s

clean:
	rm -rf .venv .venv-triton .venv-docs .peers site build dist *.egg-info mio-quickstart .mypy_cache .pytest_cache .ruff_cache
