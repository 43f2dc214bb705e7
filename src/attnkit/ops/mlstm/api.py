"""The mLSTM in its four forms: chunk by chunk, token by token, one token, all pairs."""

from torch import Tensor

from attnkit._core.dispatch import choose
from attnkit._core.errors import OptionError
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops._chunkwise_core.step import STEP_BACKENDS
from attnkit.ops.mlstm.backends import BACKENDS
from attnkit.ops.mlstm.call import prepare, prepare_step
from attnkit.ops.mlstm.reference import MAX_PAIRS, parallel, recurrent

__all__ = ["mlstm", "mlstm_parallel", "mlstm_recurrent", "mlstm_step"]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: RecurrentState | None = None,
    chunk_size: int | str = "auto",
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]:
    """A matrix memory with gates, chunk by chunk: time and memory grow with T, not with its square.

    m_t = max(logsigmoid(f_t) + m_{t-1}, i_t), which starts at 0;  S_t = exp(logsigmoid(f_t) + m_{t-1} - m_t) S_{t-1} +
    exp(i_t - m_t) k_t v_t^T;  n_t the same with 1 for v_t;
    out_t = scale * q_t^T S_t / (max(abs(scale * q_t . n_t), exp(-m_t)) + eps)

    With sigmoid gates exp(i) is sigmoid(i), and there is no m (it is 0).

    Args:
        q: [B, T, H, D], any strides; packed sequences [R, H, D].
        k: [B, T, Hkv, D] or packed [R, Hkv, D]; H is a multiple of Hkv, and H / Hkv query heads read one state.
        v: [B, T, Hkv, Dv] or packed [R, Hkv, Dv]; Dv and D may differ.
        i, f: [B, T, Hkv] or packed [R, Hkv], before exp and sigmoid, best in float32; -inf closes a gate, f = +inf opens it.
        input_gate: "exp" or "sigmoid".
        normalize: divide by q . n; exponential gates must.
        scale: of q; None means 1/sqrt(D).
        eps: added to denominators.
        initial_state: what an earlier call returned, or a single state [1, ...] that all sequences begin with; None: nothing.
        chunk_size: rows of a chunk, a power of two from 16 on, which changes time and memory and no result.
        cu_seqlens: [N + 1] int32, boundaries of packed sequences.
        backend: "auto", "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        out [B, T, H, Dv] (packed [R, H, Dv]), and the state at the end of every sequence: S [N, Hkv, D, Dv], n [N, Hkv, D]
        and m [N, Hkv] in the accumulation dtype (n only where normalised, m only with exponential gates). Gradients flow
        through all of it, and into `initial_state`.
    Raises:
        ShapeError, DTypeError, OptionError, UnsupportedError: an argument is wrong.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: for each token and head 4 D Dv + 2 L (D + Dv) operations in chunks of L rows; memory beyond inputs and outputs:
        T / L states, and the gradient as many again.
    Source: Beck et al. 2025 (arXiv:2503.14376), equations of mLSTMexp and mLSTMsig.

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v = (torch.randn(1, 7, 2, width) for width in (16, 16, 32))
    >>> i, f = torch.randn(1, 7, 2), torch.randn(1, 7, 2) + 3
    >>> out, state = ops.mlstm(q, k, v, i, f)
    >>> out.shape, state.S.shape
    (torch.Size([1, 7, 2, 32]), torch.Size([1, 2, 16, 32]))
    >>> first, state = ops.mlstm(*(x[:, :4] for x in (q, k, v, i, f)))
    >>> second, _ = ops.mlstm(*(x[:, 4:] for x in (q, k, v, i, f)), initial_state=state)
    >>> torch.allclose(torch.cat([first, second], 1), out, atol=1e-5)
    True
    """
    call = prepare(
        q, k, v, i, f, input_gate=input_gate, normalize=normalize, scale=scale, eps=eps,
        initial_state=initial_state, chunk_size=chunk_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out, state = choose("mlstm", BACKENDS, backend, call).run(call)
    return out, state


def mlstm_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: RecurrentState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, RecurrentState]:
    """`mlstm` one token after the other, by its definition: slow, and what other forms are judged by.

    Args, returns, raises, source: as of `mlstm`; autograd keeps a state for every token.
    """
    return recurrent(
        prepare(
            q, k, v, i, f, input_gate=input_gate, normalize=normalize, scale=scale, eps=eps,
            initial_state=initial_state, cu_seqlens=cu_seqlens,
        )
    )  # fmt: skip


def mlstm_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: RecurrentState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, RecurrentState]:
    """`mlstm` with all pairs of tokens at once, as attention is usually written: memory grows with the square of T.

    Args, returns, raises, source: as of `mlstm`; and OptionError above 4,096 tokens.
    """
    call = prepare(
        q, k, v, i, f, input_gate=input_gate, normalize=normalize, scale=scale, eps=eps,
        initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if call.longest**2 > MAX_PAIRS:
        raise OptionError(f"{call.longest} tokens have {call.longest**2} pairs, which this form writes down; use mlstm")
    return parallel(call)


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: RecurrentState,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState]:
    """One token of `mlstm`, for decoding.

    Args:
        q, k, v: [B, H, D], [B, Hkv, D], [B, Hkv, Dv].
        i, f: [B, Hkv].
        state: what `mlstm` or an earlier step returned; it is left as it is.
        input_gate, normalize, scale, eps: as of `mlstm`.
        backend: "auto", "triton" (no gradients) or "torch"; a named one never falls back.
    Returns:
        out [B, H, Dv] and the new state.
    Raises:
        ShapeError, DTypeError, OptionError, UnsupportedError: an argument is wrong.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Source: Beck et al. 2025 (arXiv:2503.14376).

    >>> import torch
    >>> from attnkit import ops
    >>> q, k, v, i, f = (torch.randn(1, 3, 2, *width) for width in ([16], [16], [32], [], []))
    >>> out, _ = ops.mlstm(q, k, v, i, f)
    >>> state = ops.mlstm(q[:, :2], k[:, :2], v[:, :2], i[:, :2], f[:, :2])[1]
    >>> torch.allclose(ops.mlstm_step(q[:, 2], k[:, 2], v[:, 2], i[:, 2], f[:, 2], state)[0], out[:, 2], atol=1e-5)
    True
    """
    call = prepare_step(q, k, v, i, f, state, input_gate=input_gate, normalize=normalize, scale=scale, eps=eps)
    out, state = choose("mlstm_step", STEP_BACKENDS, backend, call).run(call)
    return out, state
