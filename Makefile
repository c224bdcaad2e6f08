# make demo   the main job on embedded data, in its own virtual environment, from nothing
# make test   lint, types and the tests, likewise
# make help   the other targets
#
# PYTHON=python3.12 make test     another interpreter
# TORCH="torch==2.11.0" make demo another torch; on a machine with an NVIDIA driver it is the CUDA build

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH ?= torch==2.13.0
# PyPI's Linux torch brings gigabytes of CUDA. Where there is no NVIDIA driver, and PyTorch's index of CPU builds can be
# reached, take it from there.
CPU_INDEX := https://download.pytorch.org/whl/cpu
PYTEST ?= -n 2 --dist loadfile

.PHONY: help demo test test-slow test-lowest test-clusters test-quantised audit lock stress fuzz lint types docs check clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

demo: $(VENV)/.demo  ## a ZeRO-3 teacher distilled into a small student, ten minutes on two cores
	$(BIN)/lead-ds demo

test: lint types $(VENV)/.test  ## lint, types, and every test that takes less than minutes
	$(BIN)/python -m pytest -m "not slow and not clusters" $(PYTEST)

test-slow: $(VENV)/.test  ## the proofs that take minutes
	$(BIN)/python -m pytest -m slow

test-clusters: $(VENV)/.test  ## launch/ on a real SLURM and a real Open MPI, and kubernetes.yaml; see launch/README.md
	$(PIP) install -q -c requirements.lock -e ".[clusters]"
	$(BIN)/python -m pytest tests/clusters -rs

# In an environment of its own, over .venv's: where these packages are, transformers and peft choose other ways.
test-quantised: $(VENV)/.test  ## quantised teachers, with the packages that read them, which are installed for it
	$(PYTHON) -m venv $(VENV)-quantised
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
	  "$$($(VENV)-quantised/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	$(VENV)-quantised/bin/python -m pip install -q "bitsandbytes>=0.46.1" "torchao>=0.12" "compressed-tensors>=0.15"
	$(VENV)-quantised/bin/python -m pytest tests/models/test_quantised.py

# Of those that are built for this Python: NumPy 1.26 is not for 3.13. DeepSpeed has no wheel. Of the test tools the newest,
# but those that the package itself can use (extras) are the lowest, too. PYTHON=python3.10 is the lowest of all.
LOWEST := $(VENV)-lowest
LOWEST_PYTEST ?= -n 2 --dist loadfile
test-lowest:  ## the tests with the lowest versions that pyproject.toml allows, in an environment of its own
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q uv setuptools wheel
	$(LOWEST)/bin/uv pip compile -q pyproject.toml $(foreach x,cpu demo adapters bm25 prepare onnx,--extra $(x)) \
	  --resolution lowest-direct --only-binary :all: --no-binary deepspeed --python $(LOWEST)/bin/python -o $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python "$$(grep '^torch==' $(LOWEST)/lowest.txt)"
	DS_BUILD_OPS=0 $(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python \
	  -r $(LOWEST)/lowest.txt --no-build-isolation-package deepspeed
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python -c $(LOWEST)/lowest.txt \
	  pytest pytest-xdist pytest-timeout psutil hypothesis nbclient nbformat ipykernel
	$(LOWEST)/bin/python -m lead_ds --help
	$(LOWEST)/bin/python -m tests.lowest
	$(LOWEST)/bin/python -m pytest -m "not slow and not clusters" $(LOWEST_PYTEST)

# In an environment of its own. It asks pypi.org/pypi/NAME/VERSION/json for each, which mirrors of PyPI seldom serve.
audit:  ## known vulnerabilities of what requirements.lock and the Makefile install, by pip-audit; needs pypi.org itself
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install -q "pip-audit>=2.9"
	echo "$(TORCH)" > $(VENV)-audit/torch.txt
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off \
	  -r requirements.lock -r $(VENV)-audit/torch.txt

lock: $(VENV)/.torch  ## the newest versions into requirements.lock, for Python 3.10 to 3.13
	$(PIP) install -q uv
	echo '# The versions that this was tested with, for `make demo` and `make test`. Made by `make lock`; torch is chosen in the Makefile.' \
	  > requirements.lock
	$(BIN)/uv pip compile -q pyproject.toml --extra cpu --extra demo --extra test --extra docs --extra clusters --universal --upgrade \
	  --python-version 3.10 --no-emit-package torch --no-emit-package triton --no-annotate --no-header \
	  | grep -v '^nvidia-\|^cuda-' >> requirements.lock

stress: $(VENV)/.test  ## kill runs and commands 500 times at random moments, continue each, compare; goes on with its log
	$(BIN)/python -m tests.stress 500 --log benchmarks/results/stress.jsonl

fuzz: $(VENV)/.test  ## give every reader 100,000 inputs that nobody wrote
	$(BIN)/python -m tests.fuzz 100000 --out benchmarks/results/fuzz.json

lint: $(VENV)/.test  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## mypy, of what pyproject.toml names
	$(BIN)/mypy

docs: $(VENV)/.test  ## the documentation site, into site/; strict, no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: test  ## the same as test

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U pip setuptools wheel
	@if ! command -v nvidia-smi >/dev/null 2>&1 && curl -sfIL --max-time 5 $(CPU_INDEX)/torch/ >/dev/null 2>&1; then \
	  $(PIP) install "$(TORCH)" --extra-index-url $(CPU_INDEX); else $(PIP) install "$(TORCH)"; fi
	@touch $@

# DeepSpeed compiles its operators when they are first used, not at installation; its build needs the torch above.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml requirements.lock
	DS_BUILD_OPS=0 $(PIP) install -q -c requirements.lock --no-build-isolation "deepspeed>=0.19.8"
	$(PIP) install -q -c requirements.lock -e ".[cpu,demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install -q -c requirements.lock -e ".[cpu,demo,test,docs]"
	@touch $@

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-quantised $(VENV)-audit site .pytest_cache .mypy_cache .ruff_cache
