"""NVIDIA GPUs through torch.cuda (ROCm builds of torch answer to the same name)."""

import gc

import torch

COMPILE_TOKEN_STEPS = 10_000_000


class CudaBackend:
    """torch on one GPU."""

    name = "cuda"

    def available(self) -> bool:
        """Whether torch sees a GPU."""
        return torch.cuda.is_available()

    def compute_dtype(self) -> torch.dtype:
        """bfloat16 where the GPU has it, else float16."""
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    def attention(self, seqlen: int) -> str:
        """Fused at every length."""
        del seqlen  # no bearing here
        return "sdpa"

    def compile_helps(self, token_steps: int) -> bool:
        """Only for runs that outlast the compilation."""
        return token_steps >= COMPILE_TOKEN_STEPS

    def memory_bytes(self) -> int:
        """Memory that torch holds on the current GPU."""
        return torch.cuda.memory_allocated()

    def release_memory(self) -> None:
        """Empty torch's cache of freed memory."""
        gc.collect()
        torch.cuda.empty_cache()


CUDA = CudaBackend()
