"""Time and memory of writing five layouts, read-back included, beside one pass of calibration data.

SmolLM2-135M-Instruct in bfloat16, rounded to nearest: 4 bits in groups of 64 for four layouts of folders, Q4_0 for a
GGUF file.
The pass is what the default recipe captures, 128 rows of 2048 tokens through the float model in the dtype that the
engine computes in, measured on a part of them. Memory is the peak of what no file backs in a process that exports from
the journal, less what it held before it opened the model, in units of one shard. A GGUF file is not split: its figure
is in the same unit and is mostly the loading of the tokenizer.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import autoround
from autoround.backends.cpu import CPU
from autoround.engine import Run
from autoround.export import Target, export_journal
from autoround.formats.writer import parse_size

if __package__:
    from benchmarks import machine, smollm2
else:
    import machine
    import smollm2

FOLDERS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor")
FILE = "gguf:q4_0"
ROWS, TOKENS = 128, 2048


def rounded(source: Path, folder: Path, formats: tuple[str, ...], shard: str) -> Run:
    """A finished run, nothing exported yet."""
    groups = {} if formats[0] == FILE else {"group_size": 64}
    recipe = autoround.Recipe.preset(
        "rtn", format=formats, output_dir=str(folder), clip_search=False, max_shard_size=shard, **groups
    )
    run = autoround.quantize(source, recipe)
    for _ in run:
        pass
    return run


def written(journal: Path, form: str, folder: Path, shard: str) -> tuple[float, float]:
    """Seconds and peak megabytes of one export from a journal, in a process of its own."""
    command = [sys.executable, __file__, "--shard", shard, "--export", str(journal), form, str(folder)]
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    seconds, megabytes = map(float, last.split())
    return seconds, megabytes


def export(journal: str, form: str, folder: str, shard: str) -> None:
    """What the process of ``written`` does; prints its figures. Mapped files do not count."""
    before, start, peak, done = anonymous_bytes(), time.monotonic(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    export_journal(journal, Target(folder=Path(folder), formats=(form,), max_shard_size=shard))
    done.set()
    watcher.join()
    print(time.monotonic() - start, (peak - before) / 1e6)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def calibration_seconds(source: Path, rows: int) -> float:
    """Seconds for a pass of ``ROWS`` rows, measured on ``rows`` of them."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=CPU.compute_dtype()).eval()
    tokens_BT = torch.randint(100, 40_000, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()
    with torch.inference_mode():
        for row_T in tokens_BT:
            model.model(input_ids=row_T[None], use_cache=False)
    return (time.monotonic() - start) * ROWS / rows


def run() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", default="64MB", help="largest size of a weight file")
    parser.add_argument("--rows", type=int, default=8, help="rows of the pass to measure")
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(*options.export, options.shard)
        return
    print(machine.describe(), flush=True)
    shard = parse_size(options.shard)
    with tempfile.TemporaryDirectory() as name:
        folder, total = Path(name), 0.0
        source = folder / "source"
        smollm2.save_dithered(source)
        runs = {form: run for run in (
            rounded(source, folder / "folders", FOLDERS, options.shard),
            rounded(source, folder / "file", (FILE,), options.shard),
        ) for form in run.recipe.format}  # fmt: skip
        for form, done in runs.items():
            seconds, megabytes = written(done.journal_folder, form, folder / form.replace(":", "_"), options.shard)
            total += seconds
            print(f"{form:>16}: {seconds:5.1f} s   peak {megabytes:6.0f} MB, {megabytes * 1e6 / shard:.2f} shards")
        print(f"{'all five':>16}: {total:5.1f} s")
        print(f"one pass of {ROWS} x {TOKENS} tokens: {calibration_seconds(source, options.rows):.1f} s")


if __name__ == "__main__":
    run()
