"""Calls whose every memory access compute-sanitizer watches; run by test_attention_gpu.py in a process of its own.

torch's allocator hands out pieces of large blocks, where an access beyond a tensor stays unseen; so caching is off.
"""

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from attnkit import ops


def _watch(num_q: int, num_k: int, heads: tuple[int, int], width: int, dtype: torch.dtype, **options: object) -> None:
    shapes = ((num_q, heads[0]), (num_k, heads[1]), (num_k, heads[1]))
    lead = () if "cu_seqlens_q" in options else (1,)
    q, k, v = (torch.randn(*lead, *shape, width, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes)
    if options.pop("bias", False):
        options["key_bias"] = torch.randn(1, num_k, device="cuda", dtype=dtype)
    out = ops.attention(q, k, v, backend="triton", **options)
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    torch.cuda.synchronize()


if __name__ == "__main__":
    cu = torch.tensor([0, 63, 63, 200], dtype=torch.int32, device="cuda")
    _watch(129, 129, (4, 2), 64, torch.bfloat16, causal=True)
    _watch(65, 131, (3, 1), 40, torch.float16, causal=True, window_size=(20, 0), bias=True)
    _watch(200, 200, (2, 2), 64, torch.bfloat16, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    _watch(1, 4099, (8, 2), 128, torch.bfloat16, causal=True)
    _watch(33, 70, (2, 1), 32, torch.float32, softcap=3.0)
    print("5 calls watched")
