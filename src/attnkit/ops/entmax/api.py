"""Alpha-entmax along a dimension: probabilities with exact zeros, their threshold, and the loss that goes with them."""

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_choice, check_dtype
from attnkit._core.dispatch import choose
from attnkit._core.errors import OptionError, ShapeError
from attnkit.ops.entmax.backends import BACKENDS
from attnkit.ops.entmax.call import check_alpha, prepare
from attnkit.ops.entmax.rows import thresholds

__all__ = ["entmax", "entmax15", "entmax_loss", "entmax_threshold", "sparsemax"]


def entmax(
    x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Probabilities that are exactly zero where scores are low.

    p_i = [(alpha - 1) x_i - tau]_+^(1 / (alpha - 1)), with the tau for which they add up to one

    Args:
        x: scores of any shape; -inf is never chosen.
        alpha: 1 is softmax, 1.5 the usual choice, 2 sparsemax, and what lies between; a number, or a tensor that broadcasts
            against x with size 1 along `dim`, in (1, 2], through which gradients flow.
        dim: the dimension that adds up to one.
        mask: bool, broadcasts to x, True where an entry takes part.
        backend: "auto", "triton", "torch" or "reference"; a named one never falls back.
    Returns:
        Probabilities in the shape and dtype of x; 0 where a row has no entry; a row that holds NaN or +inf is NaN.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong; alpha outside [1, 2] is refused.
        BackendUnavailable: the named backend refuses; the message lists its reasons.
    Complexity: a few passes over x (three to ten, until the threshold no longer moves); memory of x and the result.
    Source: Peters et al. 2019 (arXiv:1905.05702); sparsemax of Martins and Astudillo 2016 (arXiv:1602.02068); the gradient of
        alpha as in Correia et al. 2019 (arXiv:1909.00015).

    >>> import torch
    >>> from attnkit import ops
    >>> ops.entmax(torch.tensor([2.0, 1.0, 0.0, -1.0]))
    tensor([0.8307, 0.1693, 0.0000, 0.0000])
    """
    call = prepare(x, alpha, dim, mask=mask)
    return call.restore(choose("entmax", BACKENDS, backend, call).run(call)).to(call.dtype)


def sparsemax(x: Tensor, dim: int = -1, *, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`entmax` with alpha 2: the point of the probability simplex that is nearest to x.

    >>> import torch
    >>> from attnkit import ops
    >>> ops.sparsemax(torch.tensor([1.0, 0.5, -1.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    return entmax(x, 2.0, dim, mask=mask, backend=backend)


def entmax15(x: Tensor, dim: int = -1, *, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`entmax` with alpha 1.5.

    >>> import torch
    >>> from attnkit import ops
    >>> ops.entmax15(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return entmax(x, 1.5, dim, mask=mask, backend=backend)


def entmax_threshold(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, mask: Tensor | None = None) -> Tensor:
    """The threshold tau of `entmax`, in units of (alpha - 1) * x.

    Args:
        x, alpha, dim, mask: as of `entmax`; alpha must lie above 1.
    Returns:
        tau with size 1 along `dim`, float32 (float64 with float64 scores); +inf where a row has no entry. It has no gradient.
    Raises:
        OptionError: alpha is 1: softmax has no threshold.

    >>> import torch
    >>> from attnkit import ops
    >>> x = torch.tensor([2.0, 1.0, 0.0, -1.0])
    >>> (0.5 * x - ops.entmax_threshold(x)).clamp(min=0).square()
    tensor([0.8307, 0.1693, 0.0000, 0.0000])
    """
    with torch.no_grad():
        call = prepare(x, alpha, dim, mask=mask)
        if call.alphas is None and call.alpha == 1:
            raise OptionError("alpha=1 is softmax, which has no threshold; give an alpha above 1")
        return call.restore(thresholds(call.rows, call.alphas, call.alpha))


def entmax_loss(
    logits: Tensor, target: Tensor, alpha: float | Tensor = 1.5, *, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """The Fenchel-Young loss of entmax: what cross entropy is to softmax.

    L = sum_c p_c (x_c - x_target) + (1 - sum_c p_c^alpha) / (alpha (alpha - 1)),  p = entmax(x, alpha)

    It is 0 where the target's score leads by 1 / (alpha - 1), and its gradient is p - onehot(target).

    Args:
        logits: [..., C].
        target: [...] int64 classes.
        alpha: as of `entmax`; a tensor broadcasts against [..., 1].
        reduction: "mean" (over targets that count), "sum" or "none".
        ignore_index: targets of this value count for nothing.
    Returns:
        The loss, in the accumulation dtype of the logits: a number, or [...] without reduction.
    Raises:
        ShapeError, DTypeError, OptionError: an argument is wrong.
    Source: Blondel et al. 2019 (arXiv:1901.02324); Peters et al. 2019 (arXiv:1905.05702).

    >>> import torch
    >>> from attnkit import ops
    >>> ops.entmax_loss(torch.tensor([[3.0, 0.5, 0.0]]), torch.tensor([0]))
    tensor(0.)
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_dtype("logits", logits, *FLOATS)
    check_dtype("target", target, torch.int64)
    if logits.dim() == 0 or target.shape != logits.shape[:-1]:
        raise ShapeError(
            f"target has shape {tuple(target.shape)}; logits {tuple(logits.shape)} need {tuple(logits.shape[:-1])}"
        )
    alpha = check_alpha(alpha)
    x = logits.to(accumulator_dtype(logits.dtype))
    ignored = target == ignore_index
    if not isinstance(alpha, Tensor) and alpha == 1:
        loss = torch.logsumexp(x, -1) - _chosen(x, target, ignored)[..., 0]
    else:
        # p maximises what the loss is, so that its own derivatives drop out, by x and by alpha
        prob = entmax(x.detach(), alpha.detach() if isinstance(alpha, Tensor) else alpha)
        margin = (x - _chosen(x, target, ignored)).masked_fill(prob == 0, 0)
        entropy = (1 - (prob**alpha).sum(-1, keepdim=True)) / (alpha * (alpha - 1))
        loss = ((prob * margin).sum(-1, keepdim=True) + entropy)[..., 0]
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum()


def _chosen(x: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
    return x.gather(-1, target.masked_fill(ignored, 0)[..., None])
