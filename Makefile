# make demo       set up and run the main job
# make test       set up and run the tests
# make test-all   the same with the long checks
#
# JAX=0.11.2 by default; JAX=latest takes the newest 0.12. EXTRAS names the extras of pyproject.toml to install.
PYTHON ?= python3
JAX ?= 0.11.2
EXTRAS ?= test
JOBS ?= 2

ifeq ($(JAX),latest)
  JAX_REQUIREMENT := jax>=0.12,<0.13
else
  JAX_REQUIREMENT := jax==$(JAX)
endif

comma := ,
VENV := .venv/$(notdir $(PYTHON))-jax-$(JAX)-$(subst $(comma),-,$(EXTRAS))
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo test test-all clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/python -m jax_fp8attn demo

test: $(VENV)/.ready
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.ready
	$(PYTEST) $(ARGS)

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and \
	    "Python 3.12 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(JAX_REQUIREMENT)' --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
