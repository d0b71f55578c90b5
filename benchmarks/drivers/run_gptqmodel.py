"""GPTQModel's GPTQ on the job of a JSON file: ``run_gptqmodel.py JOB.json``. See ``benchmarks/peers.py``."""

import json
import sys
from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig

job = json.loads(Path(sys.argv[1]).read_text())
rows = json.loads(Path(job["tokens"]).read_text())
config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=job["sym"], device="cpu")
model = GPTQModel.load(job["source"], config)
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=job["batch_size"])
model.save(job["output"])
