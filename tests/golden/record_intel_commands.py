"""Record what Intel auto-round 0.16.1 makes of the command lines in its own documentation.

    .venv-clients/auto-round/bin/python tests/golden/record_intel_commands.py tests/cli/intel_commands.json

Reads "command" of every line of that file and writes "theirs" beside it: what would be quantized with which settings
(nothing is), {"evaluates": true}, or {"error": …}. The file of commands is kept in its order.
"""

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from auto_round.cli.main import RECIPES
from auto_round.cli.parser import build_quantize_parser
from auto_round.schemes import PRESET_SCHEMES
from auto_round.utils import SUPPORTED_FORMATS

RECORDED = (
    "iters", "nsamples", "seqlen", "batch_size", "lr", "minmax_lr", "momentum", "gradient_accumulate_steps", "dataset",
    "seed", "quant_lm_head", "low_gpu_mem_usage", "ignore_layers", "layer_config", "enable_adam",
)  # fmt: skip


def resolve(command: str) -> dict[str, Any]:
    """What the words of a command come to."""
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
    if words[0].startswith("python"):
        words = ["auto_round", *words[3:]]
    name = words.pop(0).replace("_", "-")
    if name == "auto-round-eval" or "--eval" in words or words[:1] == ["eval"]:
        return {"evaluates": True}
    if words[:1] == ["list"]:
        return {"lists": True}
    preset = name.removeprefix("auto-round").removeprefix("-").replace("-", "_") or "default"
    if preset not in (*RECIPES, "mllm"):
        return {"error": f"no command {name}"}
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            args = build_quantize_parser().parse_args(words)
    except SystemExit:
        return {"error": told.getvalue().strip().splitlines()[-1].partition("error: ")[2]}
    for key, value in RECIPES["default" if preset == "mllm" else preset].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.model_free:
        args.iters = 0
    return _settings(args)


def _settings(args: Any) -> dict[str, Any]:
    formats = args.format.lower().replace(" ", "").split(",")
    if wrong := [name for name in formats if name not in SUPPORTED_FORMATS]:
        return {"error": f"format {wrong[0]}"}
    if args.scheme.upper() not in PRESET_SCHEMES:
        return {"error": f"scheme {args.scheme}"}
    scheme = PRESET_SCHEMES[args.scheme.upper()]
    found = {name: getattr(args, name) for name in RECORDED}
    return found | {
        "model": args.model or args.model_name,
        "formats": formats,
        "bits": scheme.bits if args.bits is None else args.bits,
        "group_size": scheme.group_size if args.group_size is None else args.group_size,
        "sym": scheme.sym and not args.asym,
        "data_type": args.data_type or scheme.data_type,
        "act_bits": args.act_bits or scheme.act_bits,
        "searches": args.iters == 0 and not (args.disable_opt_rtn or args.model_free),
        "algorithm": args.algorithm,
        "schemes": args.schemes,
        "tasks": args.tasks,
    }


def main(file: Path) -> None:
    """Write what the commands of a file come to."""
    lines = json.loads(file.read_text())
    for line in lines:
        line["theirs"] = resolve(line["command"])
    file.write_text("[\n" + ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
