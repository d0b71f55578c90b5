"""The tools under comparison: how each is called for the same job, and in which environment it lives.

All get the same calibration rows, each in its own way in: autoround and auto-round as a file of texts of which they cut
the rows, the drivers of GPTQModel and llm-compressor as the ids of those rows. Apart from the rows, their length and
the batch, recipes keep their own settings, compilation included.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from autoround.data.language import parse_specs
from autoround.data.records import plain_text
from autoround.data.sources import documents
from autoround.errors import DataError
from tests.clients.environments import client_python

DRIVERS = Path(__file__).with_name("drivers")
BATCH_SIZE = 8
# Tokens of a text beyond the row that is cut from it.
SPARE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be quantized, on what and how.

    Attributes:
        source: folder of the float model.
        texts: JSON lines of texts, each a little longer than a row.
        tokens: JSON, the rows that are cut from them.
        output: folder below which the tool writes.
        iters: steps a block in place of the recipe's own; None keeps these.
        compiled: tools that decide by the size of a job whether to compile are told to.
        device: of autoround and auto-round, as ``--device_map`` takes it.
    """

    source: Path
    texts: Path
    tokens: Path
    output: Path
    bits: int
    group_size: int
    sym: bool
    rows: int
    seqlen: int
    seed: int
    iters: int | None = None
    compiled: bool = False
    batch_size: int = BATCH_SIZE
    device: str = "cpu"

    def write(self, file: Path) -> Path:
        """As JSON, for a driver."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        file.write_text(json.dumps(plain))
        return file


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One of the tools.

    Attributes:
        version: as the page names it.
        recipes: what it can do; name -> words of the command for a job.
        variables: of its environment.
    """

    version: str
    recipes: dict[str, Callable[[Job], list[str]]]
    variables: tuple[tuple[str, str], ...] = ()

    def checkpoint(self, job: Job) -> Path:
        """The folder with the configuration, wherever below the output the tool put it."""
        found = sorted(job.output.rglob("config.json"))
        if not found:
            raise FileNotFoundError(f"{job.output}: found no config.json; needed the tool's checkpoint")
        return found[0].parent


def _settings(job: Job, *, data: bool) -> list[str]:
    words = [str(job.source), "--bits", str(job.bits), "--group_size", str(job.group_size), "--format", "auto_round",
             "--output_dir", str(job.output), "--device_map", job.device, *([] if job.sym else ["--asym"])]  # fmt: skip
    if data:
        words += ["--nsamples", str(job.rows), "--seqlen", str(job.seqlen), "--seed", str(job.seed),
                  "--batch_size", str(job.batch_size)]  # fmt: skip
    words += ["--enable_torch_compile"] * job.compiled
    return words + ([] if job.iters is None else ["--iters", str(job.iters)])


def _command(
    program: Sequence[Path | str], options: str, extra: tuple[str, ...], *, data: bool
) -> Callable[[Job], list[str]]:
    """Both take the same words, but for options of the data set."""
    return lambda job: [
        *map(str, program), *_settings(job, data=data), *(["--dataset", f"{job.texts}{options}"] * data), *extra
    ]  # fmt: skip


def _ours(command: str, *extra: str, data: bool = True) -> Callable[[Job], list[str]]:
    return _command([Path(sys.executable).with_name(command)], ":concat=False", extra, data=data)


def _theirs(command: str, *extra: str, data: bool = True) -> Callable[[Job], list[str]]:
    return _command([client_python("auto-round").with_name(command)], "", extra, data=data)


def _in_float32(python: Path, tool: str, options: str) -> dict[str, Callable[[Job], list[str]]]:
    """The default recipe where the processor is said to have no bfloat16."""
    return {"float32": _command([python, DRIVERS / "run_in_float32.py", tool], options, (), data=True)}


def _driver(environment: str, script: str, *words: str) -> Callable[[Job], list[str]]:
    program = [str(client_python(environment)), str(DRIVERS / script)]
    return lambda job: [*program, str(job.write(job.output.with_suffix(".job.json"))), *words]


def _twins(make: Callable[..., Callable[[Job], list[str]]]) -> dict[str, Callable[[Job], list[str]]]:
    """The recipes that autoround and auto-round share."""
    return {
        "default": make("auto-round"),
        "light": make("auto-round-light"),
        "rtn": make("auto-round-rtn", data=False),
        "opt_rtn": make("auto-round-opt-rtn"),
    }


OURS, THEIRS = "autoround", "auto-round"
TOOLS: dict[str, Tool] = {
    OURS: Tool(
        version="autoround",
        recipes=_twins(_ours)
        | _in_float32(Path(sys.executable), OURS, ":concat=False")
        # other steps than any recipe of auto-round takes
        | {f"{steps}-steps": _ours("auto-round", "--iters", str(steps)) for steps in (20, 25, 28, 30)}
        # scales of all blocks together, after the last one
        | {
            f"opt_rtn+{steps}-scale-steps": _ours("auto-round-opt-rtn", "--scale_steps", str(steps))
            for steps in (24, 32, 48, 64)
        }
        | {"light+64-scale-steps": _ours("auto-round-light", "--scale_steps", "64")},
    ),
    THEIRS: Tool(
        version="auto-round 0.16.1", recipes=_twins(_theirs) | _in_float32(client_python("auto-round"), THEIRS, "")
    ),
    "gptqmodel": Tool(
        version="GPTQModel 7.7.0",
        recipes={"gptq": _driver("gptqmodel", "run_gptqmodel.py")},
        # It does not start on two cores without this.
        variables=(("GPTQMODEL_CPU_WORKERS", "2"),),
    ),
    "llm-compressor": Tool(
        version="llm-compressor 0.14.0.1",
        recipes={
            "gptq": _driver("llm-compressor", "run_llm_compressor.py", "gptq"),
            "autoround": _driver("llm-compressor", "run_llm_compressor.py", "autoround"),
        },
    ),
}


def write_calibration(
    tokenizer: PreTrainedTokenizerBase, texts: Path, tokens: Path, *, rows: int, seqlen: int, seed: int
) -> None:
    """Write rows of Python's documentation, as texts and as token ids.

    Args:
        tokenizer: of the model to be quantized.
        texts: file for JSON lines; the tools' first ``seqlen`` tokens of each text are a row.
        tokens: file for these rows.
        rows: how many.
        seqlen: tokens in a row.
        seed: of the documents' order.

    Raises:
        DataError: too little documentation.
    """
    made: list[tuple[str, list[int]]] = []
    width = seqlen + SPARE
    for document in documents(parse_specs("python-docs")[0], rng=random.Random(seed), rows=rows):
        ids = tokenizer(plain_text(document), verbose=False).input_ids
        for start in range(0, len(ids) - width, width):
            text = str(tokenizer.decode(ids[start : start + width], skip_special_tokens=True)).strip()
            row: list[int] = tokenizer(text, verbose=False).input_ids[:seqlen]
            if len(row) == seqlen:
                made.append((text, row))
        if len(made) >= rows:
            break
    if len(made) < rows:
        raise DataError(f"python-docs: found {len(made)} rows of {seqlen} tokens; needed {rows}; ask for fewer")
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in made[:rows]))
    tokens.write_text(json.dumps([row for _, row in made[:rows]]))


def as_record(job: Job) -> dict[str, Any]:
    """The settings of a job that a result is kept with."""
    return {"bits": job.bits, "group_size": job.group_size, "sym": job.sym, "rows": job.rows, "seqlen": job.seqlen,
            "seed": job.seed, "batch_size": job.batch_size, "iters": job.iters, "compiled": job.compiled}  # fmt: skip
