# make demo       set up and run the main job
# make test       set up and run the tests
# make test-all   the same with the long checks
# make compile-check   compile every kernel for a GPU, without one, with both versions of jax (-j2: at once)
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

.PHONY: demo test test-all compile-check compile-check-0.11.2 compile-check-latest clean
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

compile-check: compile-check-0.11.2 compile-check-latest

compile-check-0.11.2 compile-check-latest:
	+$(MAKE) --no-print-directory compile-check-one JAX=$(subst compile-check-,,$@)

# The slim set: the plugin and the assembler, no cuBLAS and no cuDNN. jax 0.12 assembles through nvJitLink.
COMPILE_VENV := .venv/compile-jax-$(JAX)
CUDA_WHEELS := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm nvidia-cuda-crt
ifeq ($(JAX),latest)
  CUDA_WHEELS += nvidia-nvjitlink
endif

.PHONY: compile-check-one
compile-check-one: $(COMPILE_VENV)/.ready
	$(COMPILE_VENV)/bin/python -m jax_fp8attn compile --arch sm_90a

$(COMPILE_VENV)/.ready: pyproject.toml
	rm -rf $(COMPILE_VENV)
	$(PYTHON) -m venv $(COMPILE_VENV)
	$(COMPILE_VENV)/bin/python -m pip install --quiet '$(JAX_REQUIREMENT)' --editable .
	version=$$($(COMPILE_VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	    $(COMPILE_VENV)/bin/python -m pip install --quiet --no-deps \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version $(addsuffix ~=13.0,$(CUDA_WHEELS))
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
