"""Time and memory of writing five layouts, read-back included, beside one pass of calibration data.

SmolLM2-135M-Instruct, rounded to nearest: 4 bits in groups of 64 for four layouts of folders, Q4_0 for a GGUF file.
The pass is what the default recipe captures, 128 rows of 2048 tokens through the float model in the dtype that the
engine computes in, measured on a part of them. Memory is the peak while a layout is written and read back, less what
the process held before, in units of one shard.
"""

import argparse
import tempfile
import time
from pathlib import Path

import psutil
import torch

import autoround
from autoround.backends.cpu import CPU
from autoround.engine import Run
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


def written(run: Run, form: str, folder: Path) -> tuple[float, float]:
    """Seconds and peak megabytes of one export."""
    process = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = process.memory_info().rss, time.monotonic()
    run.export(folder, formats=[form])
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return time.monotonic() - start, (peak - before) / 1e6


def calibration_seconds(source: Path, rows: int) -> float:
    """Seconds for a pass of ``ROWS`` rows, measured on ``rows`` of them."""
    model = smollm2.load_float() if source.suffix == ".gguf" else None
    assert model is not None
    model = model.to(CPU.compute_dtype())
    tokens_BT = torch.randint(100, 40_000, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()
    with torch.inference_mode():
        for row_T in tokens_BT:
            model.model(input_ids=row_T[None], use_cache=False)
    return (time.monotonic() - start) * ROWS / rows


def run() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", default="50MB", help="largest size of a weight file")
    parser.add_argument("--rows", type=int, default=8, help="rows of the pass to measure")
    options = parser.parse_args()
    print(machine.describe(), flush=True)
    source, shard = smollm2.gguf_path(), parse_size(options.shard)
    with tempfile.TemporaryDirectory() as name:
        folder, total = Path(name), 0.0
        runs = {form: run for run in (
            rounded(source, folder / "folders", FOLDERS, options.shard),
            rounded(source, folder / "file", (FILE,), options.shard),
        ) for form in run.recipe.format}  # fmt: skip
        for form, done in runs.items():
            seconds, megabytes = written(done, form, folder / form.replace(":", "_"))
            total += seconds
            print(f"{form:>16}: {seconds:5.1f} s   peak {megabytes:6.0f} MB, {megabytes * 1e6 / shard:.2f} shards")
    print(f"{'all five':>16}: {total:5.1f} s")
    print(f"one pass of {ROWS} x {TOKENS} tokens: {calibration_seconds(source, options.rows):.1f} s")


if __name__ == "__main__":
    run()
