"""Record reference tuning runs of Intel auto-round 0.16.1 on one tiny Llama block.

    python tests/golden/record_auto_round.py OUT_DIR

Needs ``auto-round==0.16.1``; takes a minute on one CPU thread.  The real
``AutoRound(...).quantize()`` runs in fp32 (no amp, no torch.compile) and is only
observed.  Shapes: N samples, T tokens, D hidden, H head dim, O output features,
I input features, G groups per row.  Files written:

``llama_block.safetensors``
    Float weights named as in the decoder layer; the block's arguments
    ``inputs.hidden_states`` [N,T,D], ``inputs.cos`` and ``inputs.sin`` [1,T,H], and no
    attention mask (causal attention); ``targets`` [N,T,D], the float block outputs;
    ``token_mask`` [N,T], 1 where a token counts in the loss of the masked cases.
``auto_round_0_16_1.json``
    Block config, versions and, per case, the minibatch, loss and lr of each iteration.
    ``losses`` is the MSE that is differentiated, averaged over all elements of the
    minibatch, masked ones included as zeros; ``selection_losses`` picks the best
    iteration (masked cases: that MSE over the number of valid tokens in the minibatch).
``auto_round_codes.safetensors``
    ``CASE/LAYER/codes`` (uint8 [O,I]), ``scale`` [O,G] and ``zp`` (uint8 [O,G]).  The
    tuned weight is ``scale * (codes - zp)`` in fp32, checked here to be bit for bit.

Cases ending in ``_masked`` are what a default run does: the last token of each sample
and trailing repeated tokens are excluded from the loss.  In ``_unmasked`` cases the
tuner gets no token ids, as in auto-round's single-block API, so all tokens count.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import auto_round
import safetensors.torch
import torch
import transformers
from auto_round import AutoRound, calib_dataset
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

# Sign descent is chaotic: one gradient sign flipped by rounding noise moves later losses by percents.  Of the seeds
# 6 to 40, this is the one whose smallest gradient, against its layer's mean, is largest (5e-7) among those whose
# losses stay within 1e-3 with an eager attention too.
SEED, SAMPLES, TOKENS, BATCH, ITERS, GROUP = 27, 16, 32, 4, 20, 32
CONFIG: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def build() -> tuple[transformers.LlamaForCausalLM, torch.Tensor]:
    """A one-layer fp32 Llama and token ids [N,T] that depend on the seed only."""
    config = transformers.LlamaConfig(**CONFIG, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            std = 1.0 if "embed" in name else 0.1
            parameter.copy_(std * noise + (1.0 if "norm" in name else 0.0))
    generator.manual_seed(SEED + 1)
    ids_NT = torch.randint(CONFIG["vocab_size"], (SAMPLES, TOKENS), generator=generator)
    ids_NT[5, -4:] = ids_NT[5, -1]  # trailing repeats, which count as padding
    return model, ids_NT


class Run(logging.Handler):
    """Collects what the tuner computes, from its log records and wrapped methods."""

    def __init__(self, masked: bool) -> None:
        super().__init__(logging.DEBUG)
        self.masked, self.best_iter = masked, -1
        names = ("losses", "selection_losses", "lrs", "batches")
        self.steps: dict[str, list[Any]] = {name: [] for name in names}
        self.block: dict[str, torch.Tensor] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Read the per-iteration debug record and the closing summary."""
        if str(record.msg).startswith("iter %d loss"):
            _, loss, lr = record.args
            self.steps["selection_losses"].append(float(loss))
            self.steps["lrs"].append(float(lr))
        elif match := re.search(r"-> iter (\d+):", str(record.msg)):
            self.best_iter = int(match[1])

    def wrap_loss(self, original: Any) -> Any:
        """Log the loss and the minibatch; insist on fp32 tensors without autocast."""

        def get_loss(quantizer: Any, pred: Any, ref: Any, indices: Any, *args: Any) -> Any:
            assert pred.dtype == ref.dtype == torch.float32 and pred.requires_grad
            assert not (torch.is_autocast_enabled("cpu") or quantizer.model_context.amp)
            loss = original(quantizer, pred, ref, indices, *args)
            self.steps["losses"].append(loss.item())
            self.steps["batches"].append([int(index) for index in indices])
            return loss

        return get_loss

    def wrap_block(self, original: Any) -> Any:
        """Keep the block's tensors and check that every kind of parameter was tuned."""

        def quantize_block(quantizer: Any, block: Any, *args: Any, input_ids: Any) -> Any:
            inputs, others, targets, q_inputs, _ = args
            assert q_inputs is None and others.get("attention_mask") is None
            assert all(p.dtype == torch.float32 for p in block.parameters())
            (cos, sin), *rest = others["position_embeddings"]  # one pair per batch
            assert all(torch.equal(cos, c) and torch.equal(sin, s) for c, s in rest)
            self.block = {key: t.clone() for key, t in block.state_dict().items()} | {
                "inputs.hidden_states": torch.cat(inputs), "targets": torch.cat(targets),
                "inputs.cos": cos.clone(), "inputs.sin": sin.clone(),
                "token_mask": (torch.cat(input_ids) != -100).byte(),
            }  # fmt: skip
            best = original(quantizer, block, *args, input_ids=input_ids if self.masked else None)
            for parameters in best.values():
                assert parameters["value"].abs().max() > 0
                assert parameters["min_scale"].min() < 1 > parameters["max_scale"].min()
            return best

        return quantize_block


def export_codes(layer: torch.nn.Linear) -> dict[str, torch.Tensor]:
    """Integer codes, scale and zero point of a tuned layer; checks the round trip."""
    weight_OI, scale_OG = layer.weight.detach(), layer.scale.contiguous()
    zp_OG = torch.as_tensor(layer.zp).float().expand(scale_OG.shape).contiguous()
    scale_OI = scale_OG.float().repeat_interleave(GROUP, dim=1)
    zp_OI = zp_OG.repeat_interleave(GROUP, dim=1)
    codes_OI = torch.round(weight_OI / scale_OI) + zp_OI
    assert torch.equal(scale_OI * (codes_OI - zp_OI), weight_OI)
    return {"codes": codes_OI.byte(), "scale": scale_OG, "zp": zp_OG.byte()}


def record(model: torch.nn.Module, ids_NT: torch.Tensor, run: Run, scheme: dict[str, Any]) -> Any:
    """Tune a copy of the model with auto-round, observed by `run`; return its block."""
    logger, tuner = logging.getLogger("autoround"), SignRoundQuantizer
    logger.setLevel(logging.DEBUG)
    logger.handlers = [run]
    loader = [{"input_ids": c, "attention_mask": torch.ones_like(c)} for c in ids_NT.split(BATCH)]
    loss, block = run.wrap_loss(tuner._get_loss), run.wrap_block(tuner.quantize_block)
    with (
        mock.patch.object(calib_dataset, "get_dataloader", lambda *_: loader),
        mock.patch.multiple(tuner, _get_loss=loss, quantize_block=block),
    ):
        tuned, _ = AutoRound(
            copy.deepcopy(model), SimpleNamespace(pad_token_id=None), scheme="W4A16",
            **scheme, iters=ITERS, dataset="recorded", seqlen=TOKENS, nsamples=SAMPLES,
            batch_size=BATCH, amp=False, enable_torch_compile=False, device_map="cpu",
        ).quantize()  # fmt: skip
    assert all(len(values) == ITERS for values in run.steps.values())
    assert run.best_iter == min(range(ITERS), key=run.steps["selection_losses"].__getitem__)
    return tuned.model.layers[0]


def main(out_dir: Path) -> None:
    """Record all cases into `out_dir`."""
    assert auto_round.__version__ == "0.16.1", auto_round.__version__
    torch.set_num_threads(1)
    model, ids_NT = build()
    block: dict[str, torch.Tensor] = {}
    codes: dict[str, torch.Tensor] = {}
    cases: dict[str, dict[str, Any]] = {}
    both = (True, False)
    for masked, bits, sym, dtype in itertools.product(both, (4, 2), both, ("fp16", "fp32")):
        tail = f"{'sym' if sym else 'asym'}_{dtype}_{'masked' if masked else 'unmasked'}"
        name = f"w{bits}g{GROUP}_{tail}"
        scheme = {"bits": bits, "group_size": GROUP, "sym": sym, "scale_dtype": dtype}
        tuned = record(model, ids_NT, run := Run(masked), scheme)
        block = block or run.block
        assert all(torch.equal(tensor, block[key]) for key, tensor in run.block.items())
        for layer_name, layer in tuned.named_modules():
            if isinstance(layer, torch.nn.Linear):
                assert str(layer.scale.dtype) == dtype.replace("fp", "torch.float")
                for key, tensor in export_codes(layer).items():
                    codes[f"{name}/{layer_name}/{key}"] = tensor
        best = {"best_iter": run.best_iter, "best_loss": run.steps["losses"][run.best_iter]}
        scheme |= {"masked": masked, "iters": ITERS, "lr": 1 / ITERS}
        cases[name] = scheme | best | run.steps
    versions = {m.__name__: m.__version__ for m in (auto_round, torch, transformers)}
    facts = {"versions": versions, "config": CONFIG, "attention_mask": None, "cases": cases}
    text = re.sub(r"\s+(?=[^\[]*\])", " ", json.dumps(facts, indent=1))
    out_dir.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(block, out_dir / "llama_block.safetensors")
    safetensors.torch.save_file(codes, out_dir / "auto_round_codes.safetensors")
    (out_dir / "auto_round_0_16_1.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
