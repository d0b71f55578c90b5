"""A description of the machine, printed with every figure."""

import platform

import psutil
import torch
import transformers


def describe() -> str:
    """One line: processor, cores, memory, instruction set and versions."""
    capabilities = torch.cpu.get_capabilities()
    wide = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    return (
        f"{capabilities.get('cpu_name', platform.processor())}, {psutil.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {'+'.join(wide) or 'no wide vectors'}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
