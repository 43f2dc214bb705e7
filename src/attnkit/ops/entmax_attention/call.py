"""The prepared call that every backend of entmax attention judges and runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import OptionError
from attnkit.ops.attention.call import CoreCall, check_core, check_per_head
from attnkit.ops.entmax.call import check_alpha

__all__ = ["EntmaxAttentionCall", "prepare"]


@dataclass
class EntmaxAttentionCall(CoreCall):
    """Checked arguments of entmax attention.

    Attributes:
        alphas: [H] in the accumulation dtype where alpha is a tensor.
        alpha: where it is a number; 1 means softmax.
        n_refine: updates of the threshold that kernels make at least.
        return_aux: whether more than the output is asked for.
    """

    alphas: Tensor | None
    alpha: float
    n_refine: int
    return_aux: bool

    @property
    def learned(self) -> bool:
        """Whether autograd will ask for the gradient of alpha."""
        return torch.is_grad_enabled() and self.alphas is not None and self.alphas.requires_grad

    @property
    def needs_grad(self) -> bool:
        """Whether autograd will ask for a backward pass."""
        if not torch.is_grad_enabled():
            return False
        return any(t is not None and t.requires_grad for t in (self.q, self.k, self.v, self.alphas))


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_bias: Tensor | None = None,
    n_refine: int = 2,
    return_aux: bool = False,
) -> EntmaxAttentionCall:
    """Check the arguments of `entmax_attention` (its docstring says what is raised)."""
    _, scale, left, right, softcap = check_core(
        q, k, v, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window_size, softcap
    )
    alpha = check_alpha(alpha)
    alphas = None
    if isinstance(alpha, Tensor):
        check_per_head("alpha", alpha, q)
        alphas, alpha = alpha.to(accumulator_dtype(q.dtype)), 0.0
    elif alpha == 1 and return_aux:
        raise OptionError("alpha=1 is softmax, which has no threshold to return; give an alpha above 1")
    if key_bias is not None:
        key_bias = key_bias.detach()
        _check_masks_only(key_bias)
    if n_refine < 1:
        raise OptionError(f"n_refine={n_refine} must be at least 1")
    return EntmaxAttentionCall(
        q, k, v, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, None, alphas, alpha, n_refine, return_aux
    )


def _check_masks_only(key_bias: Tensor) -> None:
    if key_bias.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading values there would wait for the device, or break the graph
    if bool(((key_bias != 0) & ~torch.isneginf(key_bias)).any()):
        raise OptionError(
            "key_bias holds values other than 0 and -inf; in entmax attention it masks keys and does nothing else"
        )
