"""Norms by name; both are torch's own."""

from torch import nn

from attnkit._core.checks import check_choice

__all__ = ["make_norm"]


def make_norm(kind: str, width: int, eps: float = 1e-5) -> nn.Module:
    """A norm over the last dimension.

    Args:
        kind: "rmsnorm" (no bias) or "layernorm" (with bias).
        width: of the last dimension.
        eps: added to the mean square or the variance.
    Raises:
        OptionError: another kind.
    """
    check_choice("norm_type", kind, ("rmsnorm", "layernorm"))
    return nn.RMSNorm(width, eps=eps) if kind == "rmsnorm" else nn.LayerNorm(width, eps=eps)
