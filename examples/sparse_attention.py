"""Sparse attention in three steps: what entmax gives to the key that matters, what it leaves out, and heads that hash or drop.

Run it with: python examples/sparse_attention.py
"""

import torch

from attnkit import modules, ops

LEAD = 6.0  # by how much the score of one key is above the noise


def dilution() -> None:
    """Softmax shares its weight with every key there is, entmax with those whose scores come near the highest."""
    print("weight of a key that leads by 6 among keys of noise")
    for count in (64, 1024, 16384):
        scores = torch.randn(count, generator=torch.Generator().manual_seed(0))
        scores[0] = LEAD
        soft, sparse = (ops.entmax(scores, alpha)[0].item() for alpha in (1.0, 1.5))
        print(f"   {count:6d} keys   softmax {soft:.3f}   entmax {sparse:.3f}")
        assert sparse > soft


def zeros() -> None:
    """How much of an attention call got exactly nothing; gradients flow through what is left."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, heads, 32, generator=generator) for heads in (4, 2, 2))
    q = (4 * q).requires_grad_()
    result = ops.entmax_attention(q, k, v, causal=True, return_aux=True)
    found = ops.attention_sparsity(result)
    for head, (share, keys) in enumerate(zip(found["element"].tolist(), found["support"].tolist(), strict=True)):
        print(f"head {head}: {100 * share:.0f} % of the pairs got nothing; a query chose {keys:.1f} keys")
    result.out.sum().backward()
    assert bool((found["element"] > 0.8).all())
    assert q.grad is not None
    assert bool(torch.isfinite(q.grad).all())


def buckets_and_drops() -> None:
    """Heads whose queries meet the keys of their own bucket, or that drop rows: the pairs that are left, and their tiles."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2048, 4, 32, generator=generator) for _ in range(3))
    ids = modules.LSHHasher(4, 32, 8)
    buckets = (ids(q), ids(k))
    keep = tuple(torch.rand(2, 1, 2048, 4, generator=generator) < 0.5)
    hashed = ops.occupancy(ops.hash_sparse_attention, q, k, v, *buckets, num_buckets=8)
    dropped = ops.occupancy(ops.qk_sparse_attention, q, k, v, *keep)
    for name, of in (("8 buckets", hashed), ("half dropped", dropped)):
        print(f"{name}: {100 * of.density:.0f} % of the pairs, {100 * of.step_share:.0f} % of the tiles of dense attention")
    out = ops.qk_sparse_attention(q, k, v, *keep)
    assert bool((out[~keep[0]] == 0).all())  # dropped queries give nothing, and their residual stream passes unchanged
    layer = modules.SparseCausalAttention(128, 4, num_buckets=8, qk_shared=True, rope=False)
    print("a layer:", tuple(layer(torch.randn(2, 100, 128)).shape))


if __name__ == "__main__":
    torch.manual_seed(0)
    dilution()
    zeros()
    buckets_and_drops()
