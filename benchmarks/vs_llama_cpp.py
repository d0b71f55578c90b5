"""GGUF files of this package beside those of llama.cpp's own quantizer, from the same weights and calibration tokens.

Both tools quantize two models: a small Llama trained here, whose rows split into blocks of 256, and the dithered
SmolLM2, whose rows of 576 take the types that stand in for K-quants. llama.cpp gets an importance matrix of the very
tokens that calibrate ours. Every file is loaded by transformers and scored on the same held-out tokens.

``python -m benchmarks.vs_llama_cpp --llama-cpp BIN``, where BIN holds llama-quantize and llama-imatrix. Their sources
come with the sdist of llama-cpp-python::

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python
    tar xf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
        -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \\
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-quantize llama-imatrix     # then BIN is build/bin

Legend: N rows, T tokens in a row, P predicted tokens.
"""

import argparse
import random
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import autoround
from autoround.data.python_docs import python_docs
from autoround.evaluate import TokenScores, compare
from autoround.formats.gguf.container import read_tensors
from benchmarks import machine, smollm2
from benchmarks.models import MODELS, once

LLAMA_CPP = "llama.cpp"
BOOTSTRAPS = 2000


def run_tool(command: list[str], log: Path) -> None:
    """Print a command and run it.

    Raises:
        SystemExit: it failed; its output is in the log.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    with log.open("w") as output:
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"{command[0]}: failed; see {log}")


class Subject:
    """A model, what is made of it, and where that is kept.

    Attributes:
        source: folder of the float model.
        folder: for everything else.
        rows_NT: calibration tokens, int64; neighbouring rows of one text.
        held_out_NT: tokens to score on.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.folder: Path = options.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = once(self.folder / name, MODELS[name])
        self._bin: Path = options.llama_cpp
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        texts = python_docs(("train",))
        random.Random(options.seed).shuffle(texts)
        self._text = "\n\n".join(texts)
        ids = tokenizer(self._text, return_tensors="pt", verbose=False).input_ids[0]
        self.rows_NT: Tensor = ids[: options.nsamples * options.seqlen].view(options.nsamples, options.seqlen)
        self.held_out_NT = smollm2.held_out_rows(tokenizer, seqlen=options.seqlen, rows=options.rows)

    def float_file(self) -> Path:
        """The model unquantized, in the checkpoint's own bfloat16."""
        return once(self.folder / "float.gguf", lambda file: self._export("bf16", 0, file))

    def importance(self) -> Path:
        """What llama-imatrix finds in the calibration tokens."""
        rows, seqlen = (str(size) for size in self.rows_NT.shape)
        text = self.folder / "calibration.txt"
        text.write_text(self._text)

        def make(file: Path) -> None:
            command = [str(self._bin / "llama-imatrix"), "-m", str(self.float_file()), "-f", str(text), "-o", str(file),
                       "-c", seqlen, "-b", seqlen, "--chunks", rows, "--process-output", "--no-ppl"]  # fmt: skip
            run_tool(command, self.folder / "imatrix.log")

        return once(self.folder / "imatrix.gguf", make)

    def theirs(self, file_type: str) -> Path:
        """llama.cpp's file."""

        def make(file: Path) -> None:
            command = [str(self._bin / "llama-quantize"), "--imatrix", str(self.importance()), str(self.float_file()),
                       str(file), file_type.upper()]  # fmt: skip
            run_tool(command, self.folder / f"{file_type}-{LLAMA_CPP}.log")

        return once(self.folder / f"{file_type}-{LLAMA_CPP}.gguf", make)

    def ours(self, file_type: str, iters: int) -> Path:
        """The file of this package."""
        name = f"{file_type}-autoround-{iters}.gguf"
        return once(self.folder / name, lambda file: self._export(file_type, iters, file))

    def scores(self, files: dict[str, Path]) -> dict[str, TokenScores]:
        """Of quantized files against the float model."""
        kept = {name: file.with_suffix(f".{len(self.held_out_NT)}-rows.scores") for name, file in files.items()}
        missing = {name: load(files[name]) for name, record in kept.items() if not _newer(record, files[name])}
        if missing:
            reference = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()
            found = compare(reference, missing, self.held_out_NT)
            for name in missing:
                save_file(found[name]._asdict(), kept[name])
        return {name: TokenScores(**load_file(record)) for name, record in kept.items()}

    def _export(self, file_type: str, iters: int, file: Path) -> None:
        output = self.folder / f"{file_type}-{iters}"
        recipe = autoround.Recipe(
            format=(f"gguf:{file_type}",),
            iters=iters,
            dataset=self.rows_NT,
            nsamples=self.rows_NT.shape[0],
            seqlen=self.rows_NT.shape[1],
            output_dir=str(output),
        )
        start = time.monotonic()
        autoround.quantize(self.source, recipe).export()
        print(f"autoround.quantize({self.source.name!r}, format={recipe.format}, iters={iters}): "
              f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
        (found,) = output.rglob("*.gguf")
        found.replace(file)


def load(file: Path) -> PreTrainedModel:
    """A file's weights as the floats they stand for."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model.eval()


def _newer(record: Path, file: Path) -> bool:
    return record.exists() and record.stat().st_mtime_ns >= file.stat().st_mtime_ns


def other_types(ours: Path, theirs: Path) -> list[str]:
    """Tensors that are not of one type and shape in both files."""
    found = [{name: (each.type, each.shape) for name, each in read_tensors(file).items()} for file in (ours, theirs)]
    return [
        f"{name}: {found[0].get(name, 'missing')}, {LLAMA_CPP} {found[1].get(name, 'missing')}"
        for name in sorted(found[0].keys() | found[1].keys())
        if found[0].get(name) != found[1].get(name)
    ]


def bootstrap(difference_P: Tensor, *, length: int = 64) -> tuple[float, float]:
    """95% interval of a mean over tokens, drawing runs of neighbouring tokens, which depend on each other."""
    runs_R = difference_P[: len(difference_P) // length * length].view(-1, length).mean(1)
    draws = torch.randint(len(runs_R), (BOOTSTRAPS, len(runs_R)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(runs_R[draws].mean(1), torch.tensor([0.025, 0.975], dtype=runs_R.dtype)).tolist()
    return low, high


def report(name: str, file: Path, scores: TokenScores, theirs: TokenScores | None) -> None:
    """One row of the table, with the paired difference to llama.cpp's file."""
    row = (
        f"{name:>16}: {file.stat().st_size / 1e6:7.2f} MB   KL {scores.kl:.5f} +- {scores.kl_error:.5f}   "
        f"same top token {scores.top1:6.2%}   perplexity {scores.perplexity:.3f}"
    )
    if theirs is not None:
        low, high = (100 * end / theirs.kl for end in bootstrap(scores.kl_P - theirs.kl_P))
        row += f"   KL {scores.kl / theirs.kl - 1:+.1%}, 95% interval {low:+.1f} … {high:+.1f}%"
    print(row, flush=True)


def compare_files(subject: Subject, file_type: str, iters: list[int]) -> None:
    """Make, check and score the files of one type."""
    theirs = subject.theirs(file_type)
    files = {f"autoround {steps}": subject.ours(file_type, steps) for steps in iters}
    print(f"\n{subject.source.name}, {file_type}:")
    for line in other_types(next(iter(files.values())), theirs):
        print(f"  of other type: {line}")
    scores = subject.scores({LLAMA_CPP: theirs, **files})
    report(LLAMA_CPP, theirs, scores[LLAMA_CPP], None)
    for name, file in files.items():
        report(name, file, scores[name], scores[LLAMA_CPP])


def version(tool: Path) -> str:
    """What the tool says of its build."""
    found = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=False)
    return " ".join((found.stdout + found.stderr).split("\n")[:2])


def run() -> None:
    """Parse options; make, check and score what is not yet there; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--file-types", nargs="+", default=["q4_k_m", "q2_k_s"])
    parser.add_argument("--iters", nargs="+", type=int, default=[0, 200])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows to score on")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vs-llama-cpp",
                        help="where finished files are kept; the same command goes on from them, also "
                        "after changes of the code: remove what is to be made again")  # fmt: skip
    options = parser.parse_args()
    disable_progress_bar()
    print(machine.describe())
    print(f"{LLAMA_CPP}: {version(options.llama_cpp / 'llama-imatrix')}")
    print(f"calibration: {options.nsamples} x {options.seqlen} tokens of Python documentation, the same for both")
    options.folder /= f"{options.nsamples}x{options.seqlen}-seed{options.seed}"
    for name in options.models:
        subject = Subject(name, options)
        print(f"{name}: {subject.held_out_NT.shape[0] * (options.seqlen - 1)} predicted held-out tokens", flush=True)
        for file_type in options.file_types:
            compare_files(subject, file_type, options.iters)


if __name__ == "__main__":
    run()
