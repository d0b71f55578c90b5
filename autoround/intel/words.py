"""Flags, arguments and schemes of auto-round 0.16 that have no name here: taken with a meaning, or refused. Torch-free.

Names are without dashes at the front and with underscores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from autoround.layers import ACTIVATIONS, INTEGERS

_EVALUATION = "not available; run lm_eval itself on a folder of the format fake"
_MIXED = "not available yet; use --layer_config to give layers bits of their own"
_ACTIVATIONS = f"{ACTIVATIONS}; use a scheme that ends in A16"
_DIFFUSION = "diffusion models are out of scope"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A flag that works though nothing here has its name.

    Attributes:
        settings: fields of ``Recipe`` that it stands for; none where things are that way already.
        note: what the user is told; empty where the settings say it all.
        values: those it takes; none for a switch.
        instead: for other values, what to do.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    note: str = ""
    values: tuple[str, ...] = ()
    instead: str = ""

    @property
    def meaning(self) -> str:
        """What it stands for, in a few words.

        >>> TAKEN["not_use_best_mse"].meaning, TAKEN["nblocks"].meaning
        ('--keep last', '1 alone: blocks are tuned one at a time; leave it out')
        """
        flags = " ".join(
            f"--{_SWITCHES.get((name, value), f'{name} {value}')}" for name, value in self.settings.items()
        )
        values = f"{' or '.join(self.values)} alone: {self.instead}" if self.values else ""
        return "; ".join(part for part in (flags, values, self.note) if part) or "as it is"


_SWITCHES: Mapping[tuple[str, object], str] = {
    ("clip_search", True): "clip_search",
    ("clip_search", False): "no_clip_search",
}
_IN_ORDER = "blocks are read one at a time, with or without it"
_REPEATS = "a run with the same settings on the same machine repeats bit for bit, with or without it"
_TEXT_ONLY = "the model's own files say what it is; its text blocks are quantized"
SIGN_ROUND = ("auto_round", "autoround", "sign_round", "signround")

TAKEN: Mapping[str, Taken] = MappingProxyType(
    {
        "not_use_best_mse": Taken(settings={"keep": "last"}),
        "no_not_use_best_mse": Taken(settings={"keep": "best"}),
        "enable_opt_rtn": Taken(settings={"clip_search": True}),
        "enable_alg_ext": Taken(
            settings={"clip_search": True}, note="their extension is not here; clips start from a search on activations"
        ),
        "model_free": Taken(settings={"iters": 0, "clip_search": False}),
        "disable_model_free": Taken(note="weights are read tensor by tensor, with or without it"),
        "no_enable_adam": Taken(note="already so: SignSGD is used unless --adam is given"),
        "no_enable_alg_ext": Taken(note="their extension is never on"),
        "no_enable_lfq": Taken(note="already so: every block is tuned on its own output"),
        "no_enable_norm_bias_tuning": Taken(note="already so: norms and biases stay as they are"),
        "enable_minmax_tuning": Taken(note="already so: both clips are tuned"),
        "enable_quanted_input": Taken(note="already so: a block is tuned on the outputs of quantized blocks"),
        "low_cpu_mem_usage": Taken(note=_IN_ORDER),
        "disable_low_cpu_mem_usage": Taken(note=_IN_ORDER),
        "enable_deterministic_algorithms": Taken(note=_REPEATS),
        "disable_deterministic_algorithms": Taken(note=_REPEATS),
        "disable_amp": Taken(note="without effect: the device chooses the dtype it computes in"),
        "amp": Taken(),
        "disable_eval": Taken(note="already so: nothing is evaluated unless --eval or --tasks asks for it"),
        "mllm": Taken(note=_TEXT_ONLY),
        "nblocks": Taken(values=("1",), instead="blocks are tuned one at a time; leave it out"),
        "platform": Taken(
            values=("hf",), instead="models come from the Hugging Face hub or a folder; download others first"
        ),
        "data_type": Taken(values=("int",), instead=f"{INTEGERS}; use --bits, --group_size and --sym or --asym"),
        "act_bits": Taken(values=("16", "32"), instead=_ACTIVATIONS),
        "sampler": Taken(values=("rand",), instead="rows are drawn at random"),
    }
)
# Arguments of Python whose False says something -> the flag that says it.
FALSE: Mapping[str, str] = MappingProxyType(
    {
        "amp": "disable_amp",
        "not_use_best_mse": "no_not_use_best_mse",
        "disable_opt_rtn": "enable_opt_rtn",
        "enable_opt_rtn": "disable_opt_rtn",
        "enable_minmax_tuning": "disable_minmax_tuning",
        "enable_quanted_input": "disable_quanted_input",
    }
)
# Those whose meaning depends on others: see ``autoround.intel.adopt``.
DEPENDENT: Mapping[str, str] = MappingProxyType(
    {
        "disable_opt_rtn": "--no_clip_search where --iters is 0; without effect on learned rounding",
        "algorithm": "auto_round as it is, rtn as --iters 0; others are refused",
        "to_quant_block_names": "--ignore_layers for all other layers",
    }
)
SYNONYMS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("algorithms", "alg", "algs", "alg_config", "alg_configs"), "algorithm") | {"dtype": "data_type"}
)

# Advice -> the flags it is for.
_REFUSED: Mapping[str, str] = {
    "not available; clips start from a search on activations, which is on by default (--clip_search)": "enable_neuqi",
    "not available: both clips are tuned; --minmax_lr 1e-9 holds them where they start": (
        "disable_minmax_tuning no_enable_minmax_tuning"
    ),
    "not available: each block is tuned on the outputs of the quantized blocks before it": (
        "disable_quanted_input no_enable_quanted_input"
    ),
    "not available: norms and biases stay as they are": "enable_norm_bias_tuning",
    "not available: every block is tuned on its own output": "enable_lfq",
    _MIXED: "avg_bits target_bits options option shared_layers ignore_scale_zp_bits",
    _ACTIVATIONS: (
        "act_group_size act_asym act_sym act_data_type act_dtype act_dynamic disable_act_dynamic "
        "static_attention_dtype static_attention_granularity"
    ),
    "not available; the cache stays in 16 bits": "static_kv_dtype static_kv_granularity",
    "a GGUF file type decides it; name one with --format, such as gguf:q4_k_m": "super_bits super_group_size",
    "not available; clips start from a search on activations, by default too (--clip_search)": (
        "awq_duo_scaling awq_n_grid awq_seqlen awq_smooth_batch_size awq_apply_clip awq_clip_as_init"
    ),
    "not available; weights are rounded without a rotation before": (
        "rotation_config rotation_type rotation_backend rotation_block_size rotation_size rotation_hadamard_type "
        "fuse_online_to_weight no_fuse_online_to_weight allow_online_rotation no_allow_online_rotation "
        "online_r1_rotation no_online_r1_rotation r1 r2 r3 r4 no_r1 no_r2 no_r3 no_r4 "
        "random_r1 random_r2 random_r3 random_r4 no_random_r1 no_random_r2 no_random_r3 no_random_r4 "
        "trainable_rotation no_trainable_rotation trainable_smooth no_trainable_smooth smooth_lr "
        "loss_type kl_top_k layerwise no_layerwise fuse_rmsnorm no_fuse_rmsnorm untie_embeddings no_untie_embeddings"
    ),
    "not available; no low-rank correction is made": (
        "svdquant_rank svdquant_low_rank_dtype svdquant_residual_iters svdquant_smooth_num_grids "
        "svdquant_smooth_max_calibration_calls svdquant_target_modules svdquant_exclude_modules "
        "svdquant_model_adapter enable_svdquant_smooth enable_svdquant_residual_early_stop"
    ),
    "not available; tune a smaller model to look for a fault": "num_hidden_layers debug_layer_num",
    "not available; the model's own processor reads the images that --dataset FILE.jsonl names": (
        "extra_data_dir processor image_processor"
    ),
    "not available; the learning rate falls linearly": "lr_scheduler",
    "use the dataset options apply_chat_template and system_prompt": "template",
    _DIFFUSION: (
        "prompt prompt_file metrics metric image_save_dir guidance_scale num_inference_steps "
        "calib_num_inference_steps diffusion_tuning_cache_size generator_seed"
    ),
    "auto-round --help lists every flag and what it takes": "list",
    _EVALUATION: "eval_gen_kwargs fewshot_as_multiturn lmms",
}
REFUSED: Mapping[str, str] = MappingProxyType(
    {flag: advice for advice, flags in _REFUSED.items() for flag in flags.split()}
)
COMMANDS: Mapping[str, str] = MappingProxyType({"list": REFUSED["list"]})

_FLOATS = "floating-point weights are out of scope; use W8A16, W4A16 or a GGUF format"
# Advice -> the schemes it is for, in upper case.
_SCHEMES: Mapping[str, str] = {
    _FLOATS: ("MXFP4 MXFP6 MXFP8 MXFP4_RCEIL MXFP8_RCEIL MXINT4 NVFP4 NVFP4_E5M3 FPW8A16 FP8_STATIC FP8_BLOCK FP8"),
    f"{ACTIVATIONS}; use W8A16": "INT8 INT8_W8A8 W8A8",
    f"{ACTIVATIONS}; use W4A16": "INT4 W4A8 W4A4",
    "integer codes have 2, 3, 4 or 8 bits; use W4A16, W8A16, or --format gguf:q5_k_m": "W5A16 W5A16G64 W5A16G32",
    "integer codes have 2, 3, 4 or 8 bits; use W8A16, or --format gguf:q6_k": "W6A16 W6A16G64 W6A16G32",
    "integer codes have 2, 3, 4 or 8 bits; use W8A16": "W7A16 W7A16G64 W7A16G32",
    "it quantizes nothing; use W8A16": "BF16 FP16",
    "not available; use W4A16 and --layer_config for layers that need more bits": "W4A16_MIXED",
}
SCHEMES: Mapping[str, str] = MappingProxyType(
    {name: advice for advice, names in _SCHEMES.items() for name in names.split()}
)
SEVERAL_SCHEMES = _MIXED
# Formats that hold nothing that is made here.
FORMATS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("mlx", "auto_round:mlx"), "MLX is out of scope; use auto_round, or a GGUF format")
    | dict.fromkeys(("fp8", "auto_round:fp8"), "floating-point weights are out of scope; use auto_round and W8A16")
    | dict.fromkeys(("gptq:marlin", "auto_gptq:marlin"), "servers choose the kernel; use auto_gptq")
    | {"svdquant_nunchaku": _DIFFUSION}
)
