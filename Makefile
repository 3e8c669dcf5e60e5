# Each target sets up what it needs; later runs find it there and are quick.
PYTHON ?= python3
BIN := .venv/bin

BASE_PACKAGES := gcc libc6-dev linux-libc-dev musl-tools make
DEMO_PACKAGES := $(BASE_PACKAGES) mmdebstrap busybox-static nftables docker-registry skopeo umoci
VM_PACKAGES := qemu-system-x86 e2fsprogs
TEST_PACKAGES := $(DEMO_PACKAGES) $(VM_PACKAGES) clang libclang-rt-14-dev uidmap iproute2 curl zsh fish

.PHONY: demo test lint unit agent-test fuzz two-sided census chain-census crash soak vm-soak api-fuzz bench lock clean

demo: ## set up, build two images, run a program in a box, show what happened
	@scripts/setup.sh $(DEMO_PACKAGES)
	@$(MAKE) -s .venv/ready
	@$(BIN)/python scripts/demo.py

test: ## set up and pass the tests
	@scripts/setup.sh $(TEST_PACKAGES)
	@$(MAKE) -s .venv/ready
	@scripts/test-user.sh
	@$(MAKE) -s lint agent-test unit

lint: .venv/ready
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

agent-test: ## the C tests, with sanitizers, and a short fuzz run
	$(MAKE) -s -C agent test
	$(MAKE) -s -C agent fuzz FUZZ_SECONDS=10

unit: .venv/ready
	$(BIN)/python -m pytest

two-sided: .venv/ready ## every promise has a mutation that its tests must catch
	$(BIN)/python scripts/two_sided.py

census: .venv/ready ## 10 000 short executions, none may lose a byte
	$(BIN)/python scripts/census.py

chain-census: .venv/ready ## 5 000 executions over API and runner while both hops break; then with the published client
	$(BIN)/python scripts/chain_census.py
	$(BIN)/python scripts/published_census.py

soak: .venv/ready ## 30 minutes of mixed load on API and runner: memory and descriptors stay flat
	$(BIN)/python scripts/soak.py

vm-soak: .venv/ready ## 500 VMs that are made, used and removed: the machine is as before
	$(BIN)/python scripts/vm_soak.py

api-fuzz: .venv/ready ## every operation of the API with 1 000 made-up requests
	HUTCH_EXAMPLES=1000 $(BIN)/python -m pytest tests/server/test_openapi.py --timeout=7200

crash: .venv/ready ## 100 rounds of kill -9, nothing left, nothing lost
	$(BIN)/python scripts/crash.py

bench: .venv/ready ## measure, next to the alternatives; writes bench/results/
	@scripts/setup.sh $(DEMO_PACKAGES) $(VM_PACKAGES)
	@scripts/bench-peers.sh
	$(BIN)/python -m bench

lock: .venv/ready ## renew the locked dependencies
	for name in runtime server dev; do $(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-header --no-annotate requirements/$$name.in -o requirements/$$name.txt; done

clean:
	rm -rf .venv .cache agent/build src/hutch/_bin

.venv/ready: requirements/dev.txt pyproject.toml hatch_build.py $(wildcard agent/*.c agent/*.h agent/guard/* agent/Makefile)
	@scripts/setup.sh $(BASE_PACKAGES)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || scripts/setup.sh python3 python3-venv
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@cmp -s requirements/dev.txt .venv/installed.txt || { \
	    $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt \
	    && cp requirements/dev.txt .venv/installed.txt; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
