"""Make the environment of the tests marked ``clients``: auto-round 0.16.1 with what its loader imports.

Run ``python tests/clients/make_client_venv.py [folder]``; the folder is by default the one that the tests use.
Nothing is done where the environment is complete already.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

VARIABLE = "AUTOROUND_CLIENT_VENV"
DEFAULT = Path(__file__).parents[2] / ".venv-clients"
NEEDS = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "accelerate",
    "datasets",
    "py-cpuinfo",
    "numba",
    "threadpoolctl",
    "pydantic",
)
CLIENT = "auto-round==0.16.1"
# Written last, so that a broken installation is made anew.
STAMP = "complete.txt"


def client_python() -> Path:
    """The interpreter that the tests run clients with; it need not exist."""
    return Path(os.environ.get(VARIABLE) or DEFAULT) / "bin" / "python"


def make(folder: Path) -> None:
    """Install, unless it is done."""
    recipe = "\n".join((*NEEDS, CLIENT))
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == recipe:
        return
    venv.create(folder, clear=True, with_pip=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*install, *NEEDS], check=True)
    subprocess.run([*install, "--no-deps", CLIENT], check=True)
    stamp.write_text(recipe)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else client_python().parents[1])
