"""llm-compressor's GPTQ or AutoRound modifier on the job of a JSON file: ``run_llm_compressor.py JOB.json RECIPE``."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

job, recipe = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
rows = json.loads(Path(job["tokens"]).read_text())
weights = {"num_bits": job["bits"], "type": "int", "symmetric": job["sym"], "strategy": "group",
           "group_size": job["group_size"]}  # fmt: skip
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
if recipe == "gptq":
    modifier = GPTQModifier(config_groups=groups, ignore=["lm_head"])
else:
    modifier = AutoRoundModifier(config_groups=groups, ignore=["lm_head"], batch_size=job["batch_size"])
model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(job["source"])
oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]),
    recipe=[modifier],
    max_seq_length=job["seqlen"],
    num_calibration_samples=len(rows),
)
model.save_pretrained(job["output"], save_compressed=True)
tokenizer.save_pretrained(job["output"])
