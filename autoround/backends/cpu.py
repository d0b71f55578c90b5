"""The CPU."""

import os
import platform
import shutil
import sys

import psutil
import torch

from autoround.backends.host import release_heap

# Measured on two cores: below this many token-steps the cold compilation costs more than it saves.
COMPILE_TOKEN_STEPS = 1_500_000
# Measured in bf16 training: torch's fused attention has a slow backward on CPUs; beyond this length the
# explicit form's T x T scores cost more memory than it is worth.
EXPLICIT_ATTENTION_TOKENS = 512


class CpuBackend:
    """torch on the host's processor."""

    name = "cpu"
    compiler = "inductor"

    def count(self) -> int:
        """All processors are one device."""
        return 1

    def compute_dtype(self) -> torch.dtype:
        """bfloat16 where the processor multiplies it natively, else float32."""
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32

    def attention(self, seqlen: int) -> str:
        """Explicit attention for short rows, fused for long ones."""
        return "eager" if seqlen <= EXPLICIT_ATTENTION_TOKENS else "sdpa"

    def lacks(self) -> str:
        """A C++ compiler, unless there is the one that inductor calls."""
        usual = "clang++" if sys.platform == "darwin" else "g++"
        words = os.environ.get("CXX", usual).split() or [usual]
        return "" if shutil.which(words[0]) else f"the C++ compiler {words[0]}"

    def compile_helps(self, token_steps: int) -> bool:
        """Only for runs that outlast the compilation."""
        return token_steps >= COMPILE_TOKEN_STEPS

    def prepare_compiler(self) -> None:
        """Find out what vectors the processor has: with an empty cache, inductor builds programs for it, for 8 s."""
        from torch._inductor import cpu_vec_isa

        cpu_vec_isa.valid_vec_isa_list()  # whose answer the compiler keeps

    def memory_bytes(self) -> int:
        """Resident memory of this process."""
        return int(psutil.Process().memory_info().rss)

    def device_bytes(self, device: torch.device) -> int | None:
        """It has the host's memory."""
        del device  # the only one
        return None

    def free_device_bytes(self, device: torch.device) -> int | None:
        """It has the host's memory."""
        del device
        return None

    def title(self, device: torch.device) -> str:
        """How many threads compute, and with which instructions."""
        del device
        sets = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
        return f"{torch.get_num_threads()} threads, {' '.join(sets) or platform.machine()}"

    def release_memory(self) -> None:
        """Glibc's allocator keeps what was freed between two live pieces until it is told to give it back."""
        release_heap()


CPU = CpuBackend()
