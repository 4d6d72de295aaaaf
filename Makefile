# Every target sets up .venv by itself; the only needs are make and Python >= 3.11.
PY := .venv/bin/python
STAMP := .venv/installed
PYTEST := $(PY) -m pytest
TWO := -n 2 --dist worksteal
WARM := $(PY) -c "from fastexit.jit.declare import warmup; warmup()"
BOUNDS := $(addprefix tests/test_,$(addsuffix .py,answers_follow apicv atomics avic bad_input batch lapic_state pi posted property snapshot stateful timer unicast))
WORDS := $(wildcard tests/test_pages_*.py) $(addprefix tests/test_,$(addsuffix .py,difference many shapes sources)) # no kernels
export FASTEXIT_CACHE_DIR ?= $(CURDIR)/build/kernel-cache

.DEFAULT_GOAL := help
.PHONY: help demo test compile compile-bounds test-jit test-nojit test-bounds test-browser test-long test-pythons lint clean
.PHONY: docs embed-test boot-lab unit-tests soak verify verify-kernels verify-inside verify-mutants bench bench-check bench-instructions

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(STAMP) ## what the fast path does, in a minute; writes build/demo/
	@mkdir -p build/demo
	@$(PY) -m fastexit demo --output build/demo

test: $(STAMP) ## the whole suite: compiled, interpreted, and with checked bounds
	@$(MAKE) --no-print-directory -j2 compile compile-bounds
	@$(MAKE) --no-print-directory test-jit
	@$(MAKE) --no-print-directory test-nojit
	@$(MAKE) --no-print-directory test-bounds

compile: $(STAMP)
	@echo "== compiling kernels, if that was not done yet"
	@$(WARM)

compile-bounds: $(STAMP)
	@NUMBA_BOUNDSCHECK=1 $(WARM)

test-jit: compile ## the suite on compiled kernels
	@echo "== compiled kernels"
	@$(PYTEST) $(TWO) -m "not long"

test-nojit: $(STAMP) ## the suite on interpreted kernels
	@echo "== interpreted kernels (NUMBA_DISABLE_JIT=1)"
	@NUMBA_DISABLE_JIT=1 $(PYTEST) $(TWO) -m "not long" $(addprefix --ignore=,$(WORDS))

test-bounds: compile-bounds ## a part of the suite with every array access checked
	@echo "== compiled kernels with checked bounds (NUMBA_BOUNDSCHECK=1)"
	@NUMBA_BOUNDSCHECK=1 $(PYTEST) $(TWO) -m "not long" $(BOUNDS)

test-browser: $(STAMP) ## the pages of fastexit report in a headless Chromium (Debian: apt-get install chromium)
	@$(PY) -m pip install --quiet -e '.[browser]'
	@$(PYTEST) tests/test_pages_html.py

test-long: $(STAMP) ## the tests that take minutes
	@$(PYTEST) -m long

test-pythons: $(STAMP) ## a part of the suite on each Python from 3.11 to 3.14 that is here, minutes each; names the missing
	@$(PY) .ci/pythons.py

embed-test: compile ## every host that fastexit can be inside of, built and run, some minutes; what is missing is named
	@$(PY) .ci/embed_test.py

BOOTED ?= 6.1
BOOTS ?= 20
boot-lab: compile ## Linux on fastexit's irqchip inside the lab's kvm_amd, 20 boots each with 1, 2 and 4 vCPUs, half an hour
	@image=$$($(PY) -c "from fastexit.kvm.lab import kernels; print(kernels.find('$(BOOTED)').image)") && \
	$(PY) -m fastexit kernels run $(BOOTED) --cpus 2 --memory 3072 --timeout 7200 --with $$image --with /bin/busybox \
		-- python examples/boot_lab.py $$image --times $(BOOTS)

unit-tests: compile ## kvm-unit-tests' interrupt tests on fastexit's irqchip; FASTEXIT_KVM_UNIT_TESTS is their folder x86
	@$(PY) examples/unit_tests.py $${FASTEXIT_KVM_UNIT_TESTS:?is not set: the folder x86 of a built kvm-unit-tests} --beside

soak: compile ## 10^9 exits of four threads, ten minutes or more: nothing lost, nothing invented
	@$(PYTEST) -m long -s -n0 tests/test_soak.py

verify: compile ## the model against the KVM of this machine, an hour or two; writes docs/verified.md
	@mkdir -p build/verify
	@for seed in 1 2 3; do \
		$(PY) -m fastexit verify --ops 1000000 --seed $$seed --json > build/verify/seed-$$seed.json || exit 1; done
	@$(PY) -m fastexit verify --ops 150000 --seed 4 --trace --json > build/verify/trace.json
	@$(PY) -m fastexit verify --ops 400 --seed 5 --only many --json > build/verify/many.json
	@for seed in 1 2 3; do $(PY) -m fastexit verify --only irqchip --ops 1000000 --seed $$seed --json \
		> build/verify/irqchip-$$seed.json || exit 1; done
	@$(PY) -m fastexit verify --only irqchip --ops 750000 --seed 4 --trace --json > build/verify/irqchip-trace.json
	@$(PY) docs/verified.py build/verify/seed-*.json build/verify/trace.json build/verify/many.json \
		build/verify/irqchip-*.json
	@$(PY) docs/generate.py

verify-mutants: $(STAMP) ## faults planted into the model, each of which verify must find, half an hour
	@$(PYTEST) -m long tests/test_mutants.py
	@$(PY) docs/verified.py build/verify/mutants.json
	@$(PY) docs/generate.py

KERNELS ?= 5.10 6.1 6.12 6.18 7.2 7.3
OPERATIONS ?= 100000
verify-kernels: compile ## the model against the lab's kernels, hours; kernels and Bochs from fastexit kernels get; OPERATIONS=1000: minutes
	@mkdir -p build/verify/kernels
	@failed=0; \
	for kernel in $(KERNELS); do for job in msr:1 guest:1 runs:1 timers:10 traces:2 hyperv:1 irqchip:1; do \
		kind=$${job%:*}; file=build/verify/kernels/$$kernel-svm-$$kind.json; \
		echo "== $$kernel, SVM, $$kind"; \
		$(PY) -m fastexit verify --kernel $$kernel --kind $$kind --ops $$(($(OPERATIONS) / $${job#*:})) --json > $$file; \
		case $$? in 0) ;; 1) failed=1;; *) exit 2;; esac; done; done; \
	for kernel in $(KERNELS); do for apicv in on off; do for job in plain:50 events:500; do \
		kind=$${job%:*}; file=build/verify/kernels/$$kernel-vmx-$$kind-$$apicv.json; \
		case $$apicv in on) without=;; *) without=--no-apicv;; esac; \
		echo "== $$kernel, VMX, APICv $$apicv, $$kind"; \
		$(PY) -m fastexit verify --kernel $$kernel --vendor vmx $$without --kind $$kind \
			--ops $$(($(OPERATIONS) / $${job#*:})) --keep $$file > /dev/null; \
		case $$? in 0) ;; 1) failed=1;; *) exit 2;; esac; done; done; done; \
	$(PY) docs/verified.py build/verify/kernels/*.json && $(PY) docs/generate.py && exit $$failed

INSIDE ?= 5.10 6.1 6.12 6.18 7.3
verify-inside: compile ## the model against the lab's kernels as ordinary hosts, from within their machines, an hour or two
	@mkdir -p build/verify/inside
	@failed=0; \
	for kernel in $(INSIDE); do for job in msr:20 guest:25 runs:33; do \
		kind=$${job%:*}; file=build/verify/inside/$$kernel-$$kind.json; \
		echo "== inside $$kernel, $$kind"; \
		$(PY) -m fastexit kernels run $$kernel -- fastexit verify --kind $$kind \
			--ops $$(($(OPERATIONS) / $${job#*:})) --json > $$file; \
		case $$? in 0) ;; 1) failed=1;; *) exit 2;; esac; done; done; \
	$(PY) docs/verified.py --inside build/verify/inside/*.json && $(PY) docs/generate.py && exit $$failed

bench: $(STAMP) ## pytest benchmarks: against C, fast beside generic path; writes build/bench/ and docs/results.md
	@rm -f build/bench/results.json
	@$(PYTEST) benchmarks --benchmark-columns=min,median,iqr,rounds
	@$(PY) benchmarks/report.py

bench-check: $(STAMP) ## fails when the last make bench missed a bar
	@$(PY) benchmarks/check.py

bench-instructions: $(STAMP) ## fails when an IPI takes more instructions than it did; needs valgrind
	@$(PY) benchmarks/instructions.py

docs: compile ## the documentation, into build/docs; a dead link is an error
	@$(PY) -m pip install -qq --disable-pip-version-check -e '.[docs]'
	@$(PY) -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

lint: $(STAMP) ## ruff, mypy, and that no public name is without a type
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@mkdir -p build
	@PYTHONPATH=src $(PY) -m basedpyright --verifytypes fastexit --ignoreexternal --pythonpath $(PY) \
		>build/types.txt || { sed -n '/^Symbols used/,$$p' build/types.txt; exit 1; }

clean: ## remove everything that was made here
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml setup.cfg
	@set -e; for py in $(PYTHON) python3.11 python3; do \
		if $$py -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; py=; done; \
	[ -n "$$py" ] || { echo "fastexit needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	[ -x $(PY) ] || { echo "setting up .venv with $$($$py -V), once"; $$py -m venv .venv || { rm -rf .venv; exit 1; }; }
	@$(PY) -m pip install -qq --disable-pip-version-check -e '.[test,plot,sim,unicorn]'
	@touch $@
