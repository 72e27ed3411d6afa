# Each command first sets up what it needs: `.venv`, with the packages of pyproject.toml at the pins of constraints.txt.
# A Python other than `python3`, when `.venv` is first made: make env PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env lab demo test test-all lint

## make lab        set up, and open the course in JupyterLab
## make test       set up, and run the tests
## make env        set up only
## make demo       ask the small trained model about three pictures
## make test-all   the tests that take minutes as well
## make lint       style and format
help:
	@sed -n 's/^## //p' Makefile

env: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) minillama4/course/setup_env.py
	@touch $@

# Without a screen JupyterLab only prints its address; as root (in a container) it has to be told that this is meant.
NO_SCREEN = $(if $(filter Linux,$(shell uname)),$(if $(DISPLAY)$(WAYLAND_DISPLAY),,--no-browser))
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

lab: env
	$(BIN)/jupyter lab $(NO_SCREEN) $(AS_ROOT) --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/00_start_here.ipynb

demo: env
	$(BIN)/minillama4 demo

test: env
	$(BIN)/python -m pytest -q -m "not slow"

test-all: env
	$(BIN)/python -m pytest -q

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
