"""The environments of the tools that the benchmarks run, beside those that the client tests have.

``python -m benchmarks.environments [NAME …]`` makes those that are named, or all; what is complete already is left.
"""

import argparse
import os
from pathlib import Path

from tests.clients.environments import ENVIRONMENTS, VARIABLE, Environment, client_python, make

# Its metadata asks for transformers up to 5.17; it runs on ours, and its modifier on the newest auto-round it knows.
LLM_COMPRESSOR = Environment(
    needs=("loguru", "pyyaml", "numpy", "requests", "tqdm", "pillow", "nvidia-ml-py", "py-cpuinfo", "numba",
           "threadpoolctl", "pydantic"),
    alone=("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "auto-round==0.15.1"),
)  # fmt: skip
NEEDED = {name: ENVIRONMENTS[name] for name in ("torch", "auto-round", "gptqmodel")} | {
    "llm-compressor": LLM_COMPRESSOR
}


def parse(words: list[str] | None = None) -> list[str]:
    """Names from the command line, or from words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NEEDED, []])  # of no names, it compares the empty list
    return parser.parse_args(words).names or list(NEEDED)


def main() -> None:
    """Make the environments."""
    names = parse()
    constraints = Path(__file__).parents[1] / "constraints.txt"
    os.environ.setdefault("PIP_CONSTRAINT", str(constraints))
    for name in names:
        print(f"{name}: {client_python(name).parents[1]} (or ${VARIABLE})", flush=True)
        make(client_python(name).parents[1], NEEDED[name])


if __name__ == "__main__":
    main()
