# Each target works on a bare checkout: it makes .venv, installs what it needs, and runs. A stamp file in .venv stands
# for each list of packages, so a second call starts at once. To choose the torch build (CPU, CUDA, ROCm), install it
# into .venv first: nothing here replaces it.
PYTHON ?= python3
PY := .venv/bin/python
# -c requirements.txt holds torch to the range of the scripts: without it a test package could pull in another torch.
# Wheels only: a source package would start compiling, or send pip back through years of old versions.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --only-binary :all: -c requirements.txt

.PHONY: help demo test bench

help:
	@echo 'make demo    train a small diffusion model on drawn animal faces and sample from it'
	@echo 'make test    run the tests (ARGS="-k house" is passed on to pytest)'
	@echo 'make bench   measure speed and memory beside other libraries (ARGS is passed on to tests/bench.py)'
	@echo 'Each makes .venv when it is missing. PYTHON=python3.12 chooses the Python for it (3.10 or newer).'

demo: .venv/.stamp-run
	$(PY) ddpm_images.py --data drawn_faces
	@echo 'The pictures lie in out/ddpm_images: samples/ (what it drew), reverse.gif and training.gif (how), loss.png.'

test: .venv/.stamp-test
	$(PY) -m pytest -q tests --durations=10 $(ARGS)

bench: .venv/.stamp-test
	$(PY) tests/bench.py $(ARGS)

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || \
	    { echo 'There is no "$(PYTHON)" here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python'; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "This needs Python 3.10 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo '$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt install python3-venv) and try again'; exit 1; } >&2
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.stamp-run: requirements.txt | .venv/bin/python
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PIP) -r requirements.txt
	@touch $@

.venv/.stamp-test: tests/requirements.txt tests/requirements-nodeps.txt .venv/.stamp-run
	$(PIP) -r tests/requirements.txt
	$(PIP) --no-deps -r tests/requirements-nodeps.txt
	@touch $@
