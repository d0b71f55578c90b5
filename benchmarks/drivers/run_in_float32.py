"""autoround or auto-round as on a processor without bfloat16: ``run_in_float32.py TOOL WORD…``.

Nothing is slowed: both decide as they do where only float32 is multiplied. See ``benchmarks/peers.py``.
"""

import sys

import torch


def run_ours() -> object:
    """Its answer to what the processor can do is torch's."""
    from autoround.cli.main import auto_round

    known = torch.cpu.get_capabilities()
    torch.cpu.get_capabilities = lambda: known | {"avx512_bf16": False, "amx_bf16": False}
    return auto_round()


def run_theirs() -> object:
    """Its answer is a class of its own."""
    from auto_round.__main__ import run
    from auto_round.utils.device import CpuInfo

    CpuInfo.bf16 = property(lambda self: False)
    return run()


sys.argv = sys.argv[1:]
sys.exit(run_ours() if sys.argv[0] == "autoround" else run_theirs())
