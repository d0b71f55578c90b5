"""Every user setting in one frozen dataclass; the command line is generated from its fields. Torch-free."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any, Literal

from autoround.coverage import STARVED_TOKENS
from autoround.errors import UsageError
from autoround.layers import LayerSetting, read_ignored, read_layer_config
from autoround.options import check_choices, option
from autoround.spec import SCALE_DTYPES, QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of one run; ``Recipe.preset`` starts from a named recipe.

    Raises:
        UsageError: a value out of its range; the message names the field.

    >>> Recipe.preset("light", bits=2, group_size=64).spec
    QuantSpec(bits=2, group_size=64, sym=True, scale_dtype='float16', zero_min=0)
    """

    # fmt: off
    model: str = option("", "hub name, folder or .gguf file", "model", "model_name", "model_name_or_path")
    revision: str | None = option(None, "branch, tag or commit of a hub model", "model")
    cache_dir: str | None = option(None, "where hub downloads are kept", "model")
    token: str | None = option(
        None, "for private and gated hub models; HF_TOKEN or `hf auth login` when unset", "model", "hf_token",
        secret=True)
    model_dtype: str | None = option(
        None, "dtype of the weights that stay unquantized; the checkpoint's own when unset", "model",
        choices=tuple(SCALE_DTYPES))
    trust_remote_code: bool = option(
        False, "run Python code that comes with the model", "model", off_flags=("disable_trust_remote_code",))

    scheme: str = option(
        "W4A16", "bits and group size by name: W2A16, W3A16, W4A16, W8A16, W4A16G32_ASYM …", "scheme", "schemes")
    bits: int | None = option(None, "2, 3, 4 or 8; overrides the scheme", "scheme", "bit")
    group_size: int | None = option(
        None, "columns that share a scale, -1 for a whole row; overrides the scheme", "scheme")
    sym: bool | None = option(
        None, "symmetric or asymmetric grid; overrides the scheme", "scheme", off_flags=("asym",))
    scale_dtype: str = option("float16", "dtype of the scales", "scheme", choices=tuple(SCALE_DTYPES))
    odd_shapes: Literal["fit", "keep", "fail"] = option(
        "fit", "rows that the group size does not divide: take a smaller one, keep them in 16 bits, or stop", "scheme",
        choices=("fit", "keep", "fail"))
    quant_lm_head: bool = option(
        False, "quantize the output head too; formats auto_round and fake", "scheme", off_flags=("no_quant_lm_head",))
    quant_nontext_module: bool = option(
        False, "quantize the tower for images and its projector too, each layer by its weight alone; formats "
        "auto_round and fake", "scheme")
    layer_config: Any = option(
        (), "settings of single layers, JSON or YAML, as text or a file: path or pattern -> scheme, settings or keep, "
        "as {k_proj: {bits: 8}, up_proj: W8A16, layers.0: keep}; later ones win, whole paths over patterns", "scheme")
    ignore_layers: Any = option(
        (), "comma list of paths, parts of paths or patterns of layers to keep in 16 bits", "scheme", "fp_layers")

    format: tuple[str, ...] = option(("auto_round",), "comma list of layouts to write", "output", "formats")
    output_dir: str = option("autoround-output", "folder for the quantized model and its journal", "output")
    overwrite: bool = option(False, "discard what is in the output folder and its journal", "output")
    restart: bool = option(False, "discard an earlier run's journal of this output folder and begin anew", "output")
    max_shard_size: str = option("5GB", "largest size of one weight file", "output")

    dataset: Any = option(
        None, "calibration text: file, folder, hub name, python-docs or self (the model writes it); options as "
        "name:num=64; NeelNanda/pile-10k when unset", "calibration")
    nsamples: int = option(128, "rows of calibration tokens", "calibration", "nsample")
    seqlen: int = option(2048, "tokens in a row", "calibration", "seq_len")
    batch_size: int = option(8, "rows in a tuning step", "calibration", "bs", "train_bs", "train_batch_size")
    seed: int = option(42, "seed of row order and batches", "calibration")

    iters: int = option(200, "tuning steps per block; 0 takes none", "tuning", "iter")
    lr: float | None = option(
        None, "learning rate of the offsets; when unset 1/iters, half of it at more than 2 bits, and twice as much "
        "from 1000 steps on at 2 and 3", "tuning")
    minmax_lr: float | None = option(None, "learning rate of the clips; that of the offsets when unset", "tuning")
    momentum: float = option(0.0, "momentum of the sign gradient", "tuning")
    adam: bool = option(False, "AdamW in place of SignSGD", "tuning", "enable_adam")
    gradient_accumulate_steps: int = option(1, "batches whose gradients one step sums up", "tuning")
    clip_search: bool | None = option(
        None, "start the clips from an activation-weighted search; when unset, on unless iters is 0, and on for GGUF",
        "tuning",
        off_flags=("no_clip_search",))
    compensate: bool | None = option(
        None, "round column after column, later ones making up for what earlier ones lost (GPTQ), and where iters is 0 "
        "fit scales of 2 and 3 bits again; when unset, on where clips are searched and iters is 0", "tuning",
        off_flags=("no_compensate",))
    starved_experts: Literal["rtn", "route_all"] = option(
        "rtn", f"experts that fewer than {STARVED_TOKENS} calibration tokens reach: take no steps (rtn), or each token "
        "is also sent to one of them in turn while the block is tuned (route_all)", "tuning",
        choices=("rtn", "route_all"))
    scale_steps: int = option(
        0, "steps after the last block that tune the scales of all blocks together, codes kept, to what the float "
        "model predicts (KL divergence); memory holds the codes of all blocks", "tuning")
    keep: Literal["last", "best"] = option(
        "last", "parameters to keep: the last ones, or those of the best minibatch", "tuning",
        choices=("last", "best"))

    device_map: str = option(
        "auto", "auto, cpu, cuda, xpu, hpu, numbers of accelerators: 0,1,2,3, or devices of modules: {mlp: 1}",
        "device", "device", "devices")
    low_gpu_mem_usage: bool = option(False, "keep activations in host memory", "device")
    activations: Literal["ram", "disk", "auto"] = option(
        "auto", "where calibration activations lie: ram, disk (memory-mapped files of the journal), or auto: on the "
        "disk where they would take more than half of the free memory; the result is the same", "device",
        choices=("ram", "disk", "auto"))
    parallel: Literal["data", "blocks"] = option(
        "data", "what the processes that torchrun starts share: the rows of every step (data), or the blocks, each of "
        "which one process tunes on what the float model makes of the rows: no step waits, less accurate", "device",
        choices=("data", "blocks"))
    torch_compile: bool | None = option(
        None, "compile the tuning step; on where it helps when unset", "device", "enable_torch_compile",
        off_flags=("disable_torch_compile",))
    # fmt: on

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name}: found {getattr(self, name)}; needed at least {least}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum: found {self.momentum}; needed at least 0 and less than 1")
        if self.momentum and self.adam:
            raise UsageError(f"momentum: found {self.momentum} with adam; needed one of them: AdamW has moments")
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name}: found {value}; needed a positive number")
        _check_output(self)
        _check_starved(self)
        check_choices(self)
        if self.model_dtype is not None:
            object.__setattr__(self, "model_dtype", SCALE_DTYPES[self.model_dtype])
        object.__setattr__(self, "layer_config", read_layer_config(self.layer_config))
        object.__setattr__(self, "ignore_layers", read_ignored(self.ignore_layers))
        _ = self.spec  # refuses impossible bits, group sizes and schemes

    @property
    def spec(self) -> QuantSpec:
        """The storage asked for: the scheme, with bits, group_size and sym laid over it."""
        given = {"bits": self.bits, "group_size": self.group_size, "sym": self.sym, "scale_dtype": self.scale_dtype}
        overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(QuantSpec.parse(self.scheme), **overrides)

    @property
    def layer_settings(self) -> tuple[LayerSetting, ...]:
        """Of single layers, whatever option they were given by."""
        return (*self.layer_config, *self.ignore_layers)

    @property
    def searches_clips(self) -> bool:
        """Whether clips start from a search: as ``clip_search`` says, or by the steps and formats."""
        if self.clip_search is not None:
            return self.clip_search
        return self.iters > 0 or any(str(name).lower().startswith("gguf:") for name in self.format)

    @property
    def compensates(self) -> bool:
        """Whether columns make up for each other's rounding errors before the first step."""
        return self.iters == 0 and self.searches_clips if self.compensate is None else self.compensate

    @property
    def tunes_blocks(self) -> bool:
        """Whether blocks learn anything from calibration text, each by itself."""
        return self.iters > 0 or self.searches_clips or self.compensates

    @property
    def needs_data(self) -> bool:
        """Whether anything is learned from calibration text."""
        return self.tunes_blocks or self.scale_steps > 0

    def learning_rate(self, bits: int) -> float:
        """Of the offsets: ``lr``, or 1/iters at 2 bits and half of it at more; doubled for long runs at 2 and 3 bits.

        docs/experiments.md has what other rates do.
        """
        if self.lr is not None:
            return self.lr
        return (2.0 if self.iters >= 1000 and bits <= 3 else 1.0) * (1.0 if bits == 2 else 0.5) / max(self.iters, 1)

    @classmethod
    def preset(cls, preset: str, /, **settings: Any) -> "Recipe":
        """A named recipe: default, best, light, rtn or opt_rtn; settings given here win over it.

        Raises:
            UsageError: no such recipe, no such setting, or a value out of range.
        """
        if preset not in PRESETS:
            raise UsageError(f"recipe: found {preset!r}; needed one of {', '.join(PRESETS)}")
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise UsageError(
                f"recipe: found unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**{**PRESETS[preset], **settings})


LEAST = {"nsamples": 1, "seqlen": 1, "batch_size": 1, "gradient_accumulate_steps": 1, "iters": 0, "scale_steps": 0}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"iters": 1000, "nsamples": 512},
    "light": {"iters": 50},
    "rtn": {"iters": 0},
    "opt_rtn": {"iters": 0, "clip_search": True},
}


def _check_output(recipe: Recipe) -> None:
    if not recipe.format:
        raise UsageError("format: found none; needed at least one, such as auto_round")
    if isinstance(recipe.format, str):
        raise UsageError(f"format: found the text {recipe.format!r}; needed a tuple such as ({recipe.format!r},)")
    if PurePath(recipe.output_dir).name in ("", ".."):
        raise UsageError(
            f"output_dir: found {str(recipe.output_dir)!r}; needed a folder of its own, such as ./quantized"
        )


def _check_starved(recipe: Recipe) -> None:
    """No format holds a stack of which some experts are quantized and others are not."""
    if str(recipe.starved_experts) == "keep":
        raise UsageError(
            "starved_experts: found keep, which no format can hold: the experts of a block are stored alike; needed "
            "rtn or route_all; --ignore_layers experts keeps all of them in 16 bits"
        )
    if recipe.starved_experts == "route_all" and not recipe.needs_data:
        raise UsageError("starved_experts: found route_all in a run without calibration text; needed rtn; leave it out")
