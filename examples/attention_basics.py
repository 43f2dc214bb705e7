"""The attention operator in five steps: shapes, a window, packed sequences, merging by the LSE, and why a backend runs.

Run it with: python examples/attention_basics.py
"""

import torch

from attnkit import ops


def shapes_and_grouped_heads() -> None:
    """Tokens before heads; eight query heads share two key heads; gradients come with it."""
    q = torch.randn(2, 100, 8, 64, requires_grad=True)  # [B, T, H, D]
    k, v = (torch.randn(2, 100, 2, 64) for _ in range(2))  # [B, S, Hkv, D]
    out = ops.attention(q, k, v, causal=True)
    out.sum().backward()
    print(f"causal: q {tuple(q.shape)}, k {tuple(k.shape)} -> out {tuple(out.shape)}, dq {tuple(q.grad.shape)}")

    # a model that keeps heads first hands in a transposed view; nothing is copied
    heads_first = q.detach().transpose(1, 2).contiguous()  # [B, H, T, D]
    again = ops.attention(heads_first.transpose(1, 2), k, v, causal=True)
    assert torch.allclose(again, out, atol=1e-6)


def a_window() -> None:
    """The row's own key is not counted: (2, 0) shows three keys."""
    q = torch.zeros(1, 6, 1, 16)
    values = torch.eye(6, 16).view(1, 6, 1, 16)  # out then holds the probabilities
    seen = ops.attention(q, q, values, window_size=(2, 0))[0, :, 0, :6] > 0
    print("window_size=(2, 0), rows x keys:")
    for row in seen:
        print("   " + " ".join("x" if key else "." for key in row))
    assert seen.sum(1).tolist() == [1, 2, 3, 3, 3, 3]


def packed_sequences() -> None:
    """Sequences of 3, 5 and 2 tokens in one row, without padding, equal three separate calls."""
    lengths = [3, 5, 2]
    q, k, v = (torch.randn(sum(lengths), 4, 32) for _ in range(3))  # [R, H, D]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()  # [0, 3, 8, 10]
    packed = ops.attention(q, k, v, causal=True, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    separate = torch.cat([ops.attention(*(x[None] for x in part), causal=True)[0] for part in parts])
    print(f"packed: {tuple(packed.shape)}, largest difference from separate calls {float((packed - separate).abs().max()):.1e}")
    assert torch.allclose(packed, separate, atol=1e-6)


def merging() -> None:
    """Attention over two halves of the keys, merged by their LSE, is attention over all of them."""
    q, k, v = (torch.randn(1, 50, 4, 32) for _ in range(3))
    halves = [ops.attention(q, k[:, keys], v[:, keys], return_lse=True) for keys in (slice(0, 20), slice(20, 50))]
    outs, lses = (torch.stack(parts) for parts in zip(*halves, strict=True))  # [P, B, T, H, D] and [P, B, T, H]
    out, lse = ops.merge_partials(outs, lses)
    whole, whole_lse = ops.attention(q, k, v, return_lse=True)
    print(f"merged halves: largest difference from the whole {float((out - whole).abs().max()):.1e}")
    assert torch.allclose(out, whole, atol=1e-6)
    assert torch.allclose(lse, whole_lse, atol=1e-5)


def which_backend() -> None:
    """Nothing runs here: `explain` only says what would, and why the others would not."""
    q = torch.randn(1, 16, 2, 32)
    print(ops.explain(ops.attention, q, q, q, causal=True))
    print(ops.explain(ops.attention, q, q, q, causal=True, softcap=30.0))


if __name__ == "__main__":
    torch.manual_seed(0)
    shapes_and_grouped_heads()
    a_window()
    packed_sequences()
    merging()
    which_backend()
