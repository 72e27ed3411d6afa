# Each command first sets up what it needs: `.venv`, with the packages of pyproject.toml at the pins of constraints.txt.
# A Python other than `python3`, when `.venv` is first made: make env PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env lab demo test test-all test-class notebooks exercises lint

## make lab        set up, and open the course in JupyterLab
## make test       set up, and run the tests
## make env        set up only
## make demo       ask the small trained model about three pictures
## make test-all   the tests that take minutes as well
## make test-class  grade a class of 200, and one that is killed ten times; about 15 minutes
## make notebooks  run the lessons and the solutions, and store what they print; the only way outputs are made
## make exercises  make exercises/ from solutions/
## make lint       style and format
help:
	@sed -n 's/^## //p' Makefile

env: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) minillama4/course/setup_env.py
	@touch $@

lab: env
	$(BIN)/minillama4 lab

demo: env
	$(BIN)/minillama4 demo

# Two files at a time; models, kernels, sandboxes and a browser are shared by the tests of one file.
test: env
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-all: env
	$(BIN)/python -m pytest -q

test-class: env
	$(BIN)/python -m pytest -q -s tests/grading/test_class.py

notebooks: env
	$(BIN)/python -m minillama4.course.notebooks

exercises: env
	$(BIN)/python -m minillama4.course.split

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
