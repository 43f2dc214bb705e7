"""Hold attention functions of your own against the conformance cases of `attnkit.ops.attention`.

A function passes where its error against float64 is at most a small multiple of what the plain form of the same precision
makes on the same inputs. The first one below does; the other two have one mistake each.

Run it with: python examples/check_my_operator.py
"""

from collections.abc import Callable

import torch
from torch import Tensor

from attnkit.lab.numerics import conformance
from attnkit.ops import OPS

CASES = ("one token", "causal, grouped heads", "causal, fewer queries than keys", "dense, one key head", "values around 2")
Function = Callable[..., tuple[Tensor, Tensor]]


def mine(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, return_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Scores and softmax in float32, one rounding at the end: out [B, T, H, Dv] and lse [B, T, H]."""
    return _attention(q, k, v, last_key=0 if causal else None, precision=torch.float32)


def one_key_too_many(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, return_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """The mistake: a causal row also sees the key after its own."""
    return _attention(q, k, v, last_key=1 if causal else None, precision=torch.float32)


def rounds_scores(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, return_lse: bool = True) -> tuple[Tensor, Tensor]:
    """The mistake: scores are rounded to the input dtype before the softmax."""
    return _attention(q, k, v, last_key=0 if causal else None, precision=q.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, last_key: int | None, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * q.shape[-1] ** -0.5
    scores = scores.to(precision).float()
    if last_key is not None:
        row, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        scores = scores.masked_fill(key > row + k.shape[1] - q.shape[1] + last_key, -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhts,bshd->bthd", (scores - lse[..., None]).exp(), v.float())
    return out.to(q.dtype), lse.transpose(1, 2)


def check(function: Function, dtype: torch.dtype) -> bool:
    """Judge outputs, LSE and gradients on the chosen cases; print the verdict and the worst quantity."""
    spec = OPS["attention"]
    rows = [row for case in spec.cases if case.name in CASES for row in conformance.check(spec, case, dtype, operator=function)]
    failed = [row for row in rows if not row.ok]
    worst = max(rows, key=lambda row: row.error / row.budget if row.budget else row.error)
    verdict = f"FAIL, {len(failed)} of {len(rows)}" if failed else f"pass, {len(rows)}"
    print(f"{function.__name__:17} {str(dtype).removeprefix('torch.'):9} {verdict} quantities")
    print(f"   worst: {worst.quantity} of {worst.case!r}: error {worst.error:.1e}, allowed {worst.budget:.1e}")
    return not failed


if __name__ == "__main__":
    torch.set_num_threads(1)  # the cases are small
    for dtype in (torch.float32, torch.bfloat16):
        assert check(mine, dtype)
        assert not check(one_key_too_many, dtype)
    assert not check(rounds_scores, torch.bfloat16)  # in float32 there is nothing to round
