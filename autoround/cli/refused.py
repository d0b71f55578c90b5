"""Flags and words of Intel's auto-round 0.16 that this package does not take, with what to use instead."""

from collections.abc import Mapping
from types import MappingProxyType

_LATER_EVALUATION = (
    "evaluation is not available yet; write --format fake and run "
    "lm_eval --model hf --model_args pretrained=FOLDER --tasks TASKS"
)

# Advice -> the flags it is for, without their leading dashes and with underscores.
_ADVICE: Mapping[str, str] = {
    "use the command auto-round-rtn or auto-round-opt-rtn, or auto-round for learned rounding": (
        "algorithm algorithms alg algs alg_config alg_configs"
    ),
    "use --clip_search or --no_clip_search": "enable_opt_rtn disable_opt_rtn",
    "the search for clips from activations takes its place; it is on by default (--clip_search)": (
        "enable_alg_ext enable_neuqi"
    ),
    "leave it out: these extensions are never on": "no_enable_alg_ext",
    "use --keep last, the default, or --keep best": "not_use_best_mse no_not_use_best_mse",
    "leave it out: SignSGD is used unless --adam is given": "no_enable_adam",
    "leave it out: both clips are always tuned; --minmax_lr sets how fast": (
        "enable_minmax_tuning disable_minmax_tuning no_enable_minmax_tuning"
    ),
    "leave it out: each block is tuned on the outputs of the quantized blocks before it": (
        "enable_quanted_input disable_quanted_input no_enable_quanted_input"
    ),
    "leave it out: blocks are tuned one at a time": "nblocks",
    "not available; norms and biases stay as they are": "enable_norm_bias_tuning no_enable_norm_bias_tuning",
    "not available; every block is tuned on its own output": "enable_lfq no_enable_lfq",
    "leave it out: the model is always read block by block": "low_cpu_mem_usage disable_low_cpu_mem_usage",
    "leave it out: weights are always read tensor by tensor; auto-round-rtn needs no data": (
        "model_free disable_model_free"
    ),
    "leave it out: a run with the same settings on the same machine repeats bit for bit": (
        "enable_deterministic_algorithms disable_deterministic_algorithms"
    ),
    "leave it out: the device chooses the dtype it computes in": "disable_amp",
    "not available yet; use --layer_config to give layers bits of their own": (
        "avg_bits target_bits options option shared_layers ignore_scale_zp_bits"
    ),
    "leave it out: all blocks are quantized; --ignore_layers keeps some in 16 bits": "to_quant_block_names",
    "weights are stored as integers; use --bits, --group_size and --sym or --asym": "data_type dtype",
    "activations stay in 16 bits; use a scheme that ends in A16": (
        "act_bits act_group_size act_asym act_data_type act_dtype disable_act_dynamic "
        "static_attention_dtype static_attention_granularity"
    ),
    "not available; the cache stays in 16 bits": "static_kv_dtype static_kv_granularity",
    "GGUF super-blocks are not available yet; use --group_size": "super_bits super_group_size",
    "not available; a clip search from activations is on by default (--clip_search)": (
        "awq_duo_scaling awq_n_grid awq_seqlen awq_smooth_batch_size awq_apply_clip awq_clip_as_init"
    ),
    "not available; weights are rounded without a rotation before": (
        "rotation_type rotation_backend rotation_block_size rotation_size rotation_hadamard_type "
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
    "models come from the Hugging Face hub or a local folder; download others first": "platform",
    "not available; tune a smaller model to look for a fault": "num_hidden_layers debug_layer_num",
    "leave it out: the model's own files say what it is": "mllm",
    "not available yet; vision and audio towers stay unquantized": "quant_nontext_module",
    "not available yet; calibration uses text alone": "extra_data_dir",
    "use the dataset options apply_chat_template and system_prompt": "template",
    "diffusion models are not supported": (
        "prompt prompt_file metrics metric image_save_dir guidance_scale num_inference_steps "
        "calib_num_inference_steps diffusion_tuning_cache_size generator_seed"
    ),
    "auto-round --help lists every flag and what it takes": "list",
    _LATER_EVALUATION: (
        "eval tasks task eval_bs limit num_fewshot eval_gen_kwargs fewshot_as_multiturn eval_task_by_task "
        "eval_backend vllm_args eval_model_dtype add_bos_token"
    ),
}

FLAGS: Mapping[str, str] = MappingProxyType(
    {flag: advice for advice, flags in _ADVICE.items() for flag in flags.split()}
)
COMMANDS: Mapping[str, str] = MappingProxyType({"eval": _LATER_EVALUATION, "list": FLAGS["list"]})
