# `make train` trains the MNIST classifier, and `make test` runs the tests. Both first install what .venv lacks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export MAX_JOBS ?= 2
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: train test fuzz bench bench-peers report docs sanitize install lint clean

train: install
	$(BIN)/birnn-mnist train $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

# Compares N random configurations with nn.LSTM and the reference.
N ?= 10000
fuzz: install
	$(BIN)/python tests/fuzz $(N)

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

bench-peers: $(VENV)/peers
	$(BIN)/python benchmarks/peers.py $(ARGS)

# Measures all that the README claims, and writes docs/report.md. It takes half an hour or more on an idle machine.
report: $(VENV)/peers
	$(BIN)/python benchmarks/report.py $(ARGS)

# Builds the documentation in build/site; a warning is an error. pip installs only the extra's packages.
docs: install
	$(BIN)/python -m pip install --quiet 'birnn_ext[docs]'
	PATH=$(CURDIR)/$(BIN):$$PATH mkdocs build

install: $(VENV)/installed

# The first run takes minutes, so each step first prints what it does. torch is installed first, because the extension is
# built against it, without build isolation.
$(VENV)/ready: pyproject.toml
	@echo "== Step 1 of 2: installs PyTorch into $(VENV): 2.8 GB to download, then 1 to 4 minutes to unpack"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install torch==2.14.1 torchvision==0.29.1 'setuptools>=77' wheel ninja pybind11
	@touch $@

# The install is editable, so Python uses the files of this folder. The extension is rebuilt when its sources change.
# This shows downloads, the target of the build, and a line for each compiled file; if it fails, all of pip's output.
$(VENV)/installed: $(VENV)/ready setup.py $(shell find csrc -type f)
	@echo "== Step 2 of 2: compiles birnn_ext: 2 to 3 minutes on two cores, 5 to 6 with CUDA kernels; the whole output: $(VENV)/build.log"
	@NINJA_STATUS='[%f of %t, %e s] ' $(BIN)/python -m pip install --no-build-isolation -v -e '.[mnist,test]' 2>&1 \
		| tee $(VENV)/build.log \
		| sed -unE -e 's/^ *(birnn_ext: |Downloading |Installing )/  \1/p' \
			-e 's/^ *(\[[0-9]+ of .* s\]) .* -c .*\/([^ ]+) -o .*/  \1 \2/p' \
		|| { cat $(VENV)/build.log; exit 1; }
	@touch $@

$(VENV)/peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[peers]'
	touch $@

# Runs the CPU kernels in a program without PyTorch, under the compiler's sanitizers. Threads meet in the same places
# whatever the instruction set.
sanitize:
	tools/native_test $(CXX) -fsanitize=address,undefined -DBIRNN_EMULATE_AMX=1
	ISAS=generic ROUNDS=10 tools/native_test $(CXX) -fsanitize=thread

lint: $(VENV)/ready
	$(BIN)/python -m pip install --quiet pre-commit ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1
	PATH=$(CURDIR)/$(BIN):$$PATH pre-commit run --all-files

clean:
	rm -rf $(VENV) build birnn_ext.egg-info birnn_ext/*.so
