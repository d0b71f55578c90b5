"""Seconds to install the built wheel in a fresh environment, torch aside, and what pip had to build for it.

By the clock, and on the processor, for other work on the machine makes it wait. Torch is installed first and is not
counted; nor are the making of the wheel and of the environment. Nothing comes from pip's cache. A package that is
published without a wheel is built by pip; compiled is one whose wheel names a platform.
"""

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

if __package__:
    from benchmarks import machine
else:
    import machine

ROOT = Path(__file__).parents[1]
COMMANDS = ("auto-round", "auto-round-best", "auto-round-light", "auto-round-eval", "auto_round")
BUILT = re.compile(r"Created wheel for (\S+): filename=(\S+)")


def pip(python: Path, *words: str) -> str:
    """Run pip; what it printed.

    Raises:
        SystemExit: it failed.
    """
    command = [str(python), "-m", "pip", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pip {' '.join(words)}: {done.stderr}")
    return done.stdout


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="for the environment, which takes some GB; a temporary one if unset"
    )
    options = parser.parse_args()
    constraints = ROOT / "constraints.txt"
    (torch,) = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        pip(Path(sys.executable), "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), ".")
        (wheel,) = folder.glob("autoround-*.whl")
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        pip(python, "install", "-q", "--no-cache-dir", "-c", str(constraints), torch)
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        told = pip(python, "install", "-v", "--no-cache-dir", "-c", str(constraints), str(wheel))
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        built = dict(BUILT.findall(told))
        compiled = [file for file in built.values() if not file.endswith("-none-any.whl")]
        installed = len(pip(python, "list", "--format", "freeze").splitlines())
        for command in COMMANDS:
            subprocess.run([folder / "venv" / "bin" / command, "--version"], check=True, stdout=subprocess.DEVNULL)
        print(f"{machine.describe()}")
        print(f"{wheel.name}, {wheel.stat().st_size / 1000:.0f} kB, beside {torch}: {installed} packages")
        print(f"{seconds:.1f} s, on the processor {processor:.1f} s")
        print(f"compiled: {', '.join(compiled) or 'nothing'}; built from pure Python: {', '.join(built) or 'nothing'}")


if __name__ == "__main__":
    main()
