"""Sums and outer products of queries as they were before rotation."""

from torch import Tensor

from attnkit._core.dispatch import choose
from attnkit.ops.query_moments.backends import BACKENDS
from attnkit.ops.query_moments.call import prepare

__all__ = ["query_moments"]


def query_moments(
    q: Tensor,
    *,
    inv_freq: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    real: Tensor | None = None,
    skip: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The first two moments of queries, turned back by their positions, as sums over tokens.

    x_t = R(-p_t) q_t - shift;  sums = sum_t x_t;  products = sum_t x_t x_t^T, over real tokens t that are not left out

    Args:
        q: [B, T, H, D], after rotation.
        inv_freq: [R / 2] radians a position, R <= D even: the first R channels were turned, the rest was not. None: none was.
        positions: [T] or [B, T] integers, where queries were rotated to; goes with `inv_freq`.
        interleaved: channel 2i turned with 2i + 1; otherwise i with i + R / 2.
        real: [B, T] bool, False for padding, which may hold anything; None means all tokens are real.
        skip: [B] integers, the first so many real tokens of each row are left out; None is 0.
        shift: [B, H, D] float32 (float64 with float64 queries), near their mean: products of what is far from 0 lose what they
            differ by. None is 0.
        backend: "auto", "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        count [B], sums [B, H, D] and products [B, H, D, D] in float32 (float64). There is no wait for the device.
    Raises:
        ShapeError, DTypeError, InputError: an argument is wrong.
        UnsupportedError: a tensor requires a gradient.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: T D^2 H multiply-adds, twice as many for queries in 16 bits that were turned or shifted; queries are read once.

    >>> import torch
    >>> from attnkit import ops
    >>> count, sums, products = ops.query_moments(torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]]))
    >>> count.tolist(), sums.tolist(), products.tolist()
    ([2.0], [[[4.0, 2.0]]], [[[[10.0, 2.0], [2.0, 4.0]]]])
    """
    call = prepare(q, inv_freq=inv_freq, positions=positions, interleaved=interleaved, real=real, skip=skip, shift=shift)
    moments: tuple[Tensor, Tensor, Tensor] = choose("query_moments", BACKENDS, backend, call).run(call)
    return moments
