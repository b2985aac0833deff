# Tomeforge: `make help` lists the commands.
PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo adapters adapters-demo test check bench clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: ## set up this machine into .venv (about 5 min, once)
	@scripts/setup.sh

demo: setup ## train, export and ask the embedded default model (at most 8 min on two cores)
	@$(PY) -m scripts.demo

adapters: setup ## train three adapters of the embedded model, and the router (about 20 min)
	@scripts/adapters.sh

adapters-demo: adapters ## load, switch, stack, merge and route them
	@$(PY) -m scripts.adapters_demo

test: setup ## run the whole test suite
	@$(PY) -m pytest -n auto --dist loadscope --no-loadscope-reorder

check: setup ## lint, format and type check
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench: setup ## measure ours against the usual way (about 30 min)
	@missed=0; for kind in train chat export; do $(PY) -m scripts.benchmark $$kind || missed=1; done; exit $$missed

clean: ## remove caches (never outputs/ or .venv)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis unsloth_compiled_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
