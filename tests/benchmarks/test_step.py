"""A guard against slow steps: a compiled step beside the products of its own linear layers, on the same machine."""

from pathlib import Path

import pytest

from benchmarks import step

# Measured on two cores with AVX512-BF16: 1.3 to 1.4 compiled, 1.9 to 2.0 eager. What computes a product twice, or falls
# out of the compiler, is above.
MOST = 1.75


@pytest.mark.slow
def test_a_compiled_step_takes_little_more_than_its_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = step.parse(["--batch", "4", "--seqlen", "256", "--seconds", "10"])
    fractions = []
    for _ in range(3):  # other work on the machine comes and goes
        fractions.append(step.measured(options)["fraction"])
        if fractions[-1] > 1 / MOST:
            return
    pytest.fail(f"a step took {1 / max(fractions):.2f} times its products; needed {MOST}")
