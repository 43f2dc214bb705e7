"""Linear attention whose state decays by one number for each head: lightning attention, and a decay for each token."""

import math

import torch
from torch import Tensor

from attnkit._core.dispatch import choose
from attnkit._core.errors import OptionError
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops._chunkwise_core.step import STEP_BACKENDS
from attnkit.ops.scalar_decay.backends import BACKENDS
from attnkit.ops.scalar_decay.call import prepare, prepare_lightning, prepare_step

__all__ = ["lightning_attention", "lightning_slopes", "scalar_decay_attention", "scalar_decay_step"]


def scalar_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: RecurrentState | None = None,
    chunk_size: int | str = "auto",
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]:
    """Linear attention with a decay for each token and head, chunk by chunk.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T;  out_t = scale * q_t^T S_t

    Mamba-2, simple gated linear attention and the mLSTM with sigmoid gates and no normaliser are instances.

    Args:
        q: [B, T, H, D], any strides; packed sequences [R, H, D].
        k: [B, T, Hkv, D] or packed [R, Hkv, D]; H is a multiple of Hkv, and H / Hkv query heads read one state.
        v: [B, T, Hkv, Dv] or packed [R, Hkv, Dv]; Dv and D may differ.
        g: [B, T, Hkv] or packed [R, Hkv], log decays, not above 0 (checked on the CPU), best in float32; -inf empties
            the state.
        scale: of q; None means 1/sqrt(D).
        initial_state: what an earlier call returned, or a single state [1, ...] that all sequences begin with; None: nothing.
        chunk_size: rows of a chunk, a power of two from 16 on, which changes time and memory and no result.
        cu_seqlens: [N + 1] int32, boundaries of packed sequences.
        backend: "auto", "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        out [B, T, H, Dv] (packed [R, H, Dv]), and the state at the end of every sequence, S [N, Hkv, D, Dv] in the
        accumulation dtype. Gradients flow through both, into g and into `initial_state`.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: as of `mlstm`.
    Source: Dao & Gu 2024 (arXiv:2405.21060), scalar structured state spaces; chunks as in Beck et al. 2025 (arXiv:2503.14376).

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 7, heads, 16) for heads in (4, 2, 2))
    >>> out, state = ops.scalar_decay_attention(q, k, v, -torch.rand(1, 7, 2))
    >>> out.shape, state.S.shape
    (torch.Size([1, 7, 4, 16]), torch.Size([1, 2, 16, 16]))
    """
    call = prepare(
        q, k, v, g, scale=scale, initial_state=initial_state, chunk_size=chunk_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out, state = choose("scalar_decay_attention", BACKENDS, backend, call).run(call)
    return out, state


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float | None = None,
    initial_state: RecurrentState | None = None,
    chunk_size: int | str = "auto",
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]:
    """Linear attention with one constant decay for each head.

    S_t = exp(-slope) S_{t-1} + k_t v_t^T;  out_t = scale * q_t^T S_t

    Args:
        q, k, v, scale, initial_state, chunk_size, cu_seqlens, backend: as of `scalar_decay_attention`.
        slopes: [Hkv], not negative (checked on the CPU); `lightning_slopes` has the usual ones.
    Returns:
        out [B, T, H, Dv] (packed [R, H, Dv]), and the state at the end of every sequence, S [N, Hkv, D, Dv].
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: as of `mlstm`.
    Source: Ling Team 2025 (arXiv:2510.19338), lightning attention of Qin et al. 2024 (arXiv:2401.04658).

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 7, 4, 16) for _ in range(3))
    >>> ops.lightning_attention(q, k, v, ops.lightning_slopes(4))[0].shape
    torch.Size([1, 7, 4, 16])
    """
    call = prepare_lightning(
        q, k, v, slopes, scale=scale, initial_state=initial_state, chunk_size=chunk_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out, state = choose("lightning_attention", BACKENDS, backend, call).run(call)
    return out, state


def scalar_decay_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: RecurrentState,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]:
    """One token of `scalar_decay_attention`, for decoding; with g = -slopes, of `lightning_attention`.

    Args:
        q, k, v: [B, H, D], [B, Hkv, D], [B, Hkv, Dv].
        g: [B, Hkv], log decays.
        state: what an earlier call returned; it is left as it is.
        scale: of q; None means 1/sqrt(D).
        backend: "auto", "triton" (no gradients) or "torch"; a named one never falls back.
    Returns:
        out [B, H, Dv] and the new state.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Source: Ling Team 2025 (arXiv:2510.19338).
    """
    call = prepare_step(q, k, v, g, state, scale=scale)
    out, state = choose("scalar_decay_step", STEP_BACKENDS, backend, call).run(call)
    return out, state


def lightning_slopes(
    num_heads: int, layer_idx: int | None = None, num_layers: int | None = None, *, layer_offset: int = 0
) -> Tensor:
    """The usual slopes: 2^(-8 (h + 1) / H), and in deeper layers a smaller share of them.

    Args:
        num_heads: H. Where it is no power of two, those of the largest power of two P below, then every other one of 2 P.
        layer_idx, num_layers: multiply by 1 - (layer_idx - layer_offset) / (num_layers - 1) + 1e-5; both or neither.
        layer_offset: 1 where layers are counted from 1.
    Returns:
        [H] float32, on the CPU.
    Raises:
        OptionError: no heads, one of the two numbers of layers without the other, or a layer that is not there.
    Source: Press et al. 2022 (arXiv:2108.12409) for the heads; Ling Team 2025 (arXiv:2510.19338) for the layers.

    >>> from attnkit import ops
    >>> ops.lightning_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    if num_heads < 1:
        raise OptionError(f"num_heads={num_heads} must be at least 1")
    if (layer_idx is None) != (num_layers is None):
        raise OptionError("layer_idx and num_layers belong together; give both or neither")
    power = 1 << int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-8 * (h + 1) / (2 * power)) for h in range(2 * power)][::2][: num_heads - power]
    factor = 1.0
    if layer_idx is not None and num_layers is not None:
        if not 0 <= layer_idx - layer_offset < num_layers:
            raise OptionError(f"layer_idx={layer_idx} is none of {num_layers} layers that are counted from {layer_offset}")
        factor = 1 - (layer_idx - layer_offset) / max(num_layers - 1, 1) + 1e-5
    return torch.tensor(slopes, dtype=torch.float32, device="cpu") * factor
