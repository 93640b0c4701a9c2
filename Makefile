# make demo       set up and run the main job
# make test       set up and run the tests (JAX=0.11.2 by default; JAX=latest for the newest 0.12.x)
# make test-all   also the long checks
PYTHON ?= python3
JAX ?= 0.11.2
EXTRAS ?= test

ifeq ($(JAX),latest)
  JAX_REQUIREMENT := jax>=0.12,<0.13
else
  JAX_REQUIREMENT := jax==$(JAX)
endif

comma := ,
VENV := .venv/jax-$(JAX)-$(subst $(comma),-,$(EXTRAS))
BIN := $(VENV)/bin

.PHONY: demo test test-all clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/python -m jax_fp8attn demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow" $(PYTEST)

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST)

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(JAX_REQUIREMENT)' --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
