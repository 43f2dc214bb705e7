"""The probe against direct formulas in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.errors import InputError, OptionError, ShapeError, UnsupportedError
from attnkit.lab.numerics import BF16, RoundingBiasProbe, custom, emulated_attention, round_to, ulp
from attnkit.lab.numerics.policy import SitePolicy
from attnkit.lab.numerics.probe import look_at
from attnkit.ops.attention.call import prepare

ALL_ROWS = RoundingBiasProbe(rows=1000)


def draw(batch: int = 2, rows: int = 24, keys: int = 24, heads: int = 4, kv: int = 2, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((rows, heads), (keys, kv), (keys, kv), (rows, heads))
    return [(torch.randn(batch, length, h, 16) + 0.5).bfloat16() for length, h in shapes]


def direct(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Any:
    """By the definitions, with every score written down; [B, H, T, S] and [B, H, T, *]."""
    group = q.shape[2] // k.shape[2]
    query, key, value, grad, stored = (t.double().transpose(1, 2) for t in (q, k, v, d_out, out))
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = (query @ key.mT * 16**-0.5 + bias).masked_fill(~seen, -torch.inf)
    p = torch.softmax(scores, -1)
    d_p = grad @ value.mT
    used, true = (grad * stored).sum(-1), (p * d_p).sum(-1)
    top_heavy = torch.exp(scores - scores.amax(-1, keepdim=True))
    error = (stored - p @ value) * (p @ value).sign()
    return {
        "eps_bias": (used - true).mean((0, 2)),
        "delta_size": true.abs().mean((0, 2)),
        "shift_leak": (p * (d_p - used[..., None])).sum(-1).mean((0, 2)) / true.abs().mean((0, 2)),
        "o_bias": error.mean((0, 2, 3)) / ulp(p @ value, BF16).mean((0, 2, 3)),
        "tie_rate": ((round_to(top_heavy, BF16) == 1).sum(-1) >= 2).double().mean((0, 2)),
        "entropy": -torch.xlogy(p, p).sum(-1).mean((0, 2)),
        "max_logit": scores.amax((0, 2, 3)),
    }


def assert_same(found: Any, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("keys", [24, 40])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (5, 2)}, {"causal": True, "window_size": (7, None)}])
def test_formulas(options: dict[str, Any], keys: int) -> None:
    q, k, v, d_out = draw(keys=keys)
    k[:, 5] = k[:, 6]  # a tie wherever both are seen
    out: Any = ops.attention(q, k, v, **options)
    left, right = options.get("window_size", (None, None))
    right = 0 if options.get("causal") else right
    offset = torch.arange(keys) - (torch.arange(24)[:, None] + keys - 24)
    seen = (offset >= (-keys if left is None else -left)) & (offset <= (keys if right is None else right))
    assert_same(ALL_ROWS(q, k, v, out=out, d_out=d_out, **options), direct(q, k, v, d_out, out, seen))


def test_padding_and_what_it_hides() -> None:
    q, k, v, d_out = draw()
    bias = torch.zeros(2, 24)
    bias[0, :7], bias[1, 20:], bias[1, 3] = -torch.inf, -torch.inf, 0.7
    k[0, :7], v[1, 20:] = torch.nan, torch.inf
    out: Any = ops.attention(q, k, v, key_bias=bias)
    found = ALL_ROWS(q, k, v, out=out, d_out=d_out, key_bias=bias)
    clean = [torch.where(torch.isfinite(t), t, 0) for t in (k, v)]
    seen = torch.isfinite(bias)[:, None, None]
    assert_same(found, direct(q, *clean, d_out, out, seen, bias.masked_fill(~torch.isfinite(bias), 0)[:, None, None]))


def test_packed_sequences_are_probed_as_if_alone() -> None:
    q, k, v, d_out = (t[0] for t in draw(batch=1, rows=30, keys=30))
    cu = torch.tensor([0, 9, 9, 30], dtype=torch.int32)
    packed = ALL_ROWS(q, k, v, d_out=d_out, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    parts = [ALL_ROWS(*(t[None, a:b] for t in (q, k, v)), d_out=d_out[None, a:b], causal=True) for a, b in ((0, 9), (9, 30))]
    for name in ("eps_bias", "tie_rate", "entropy", "sink_mass", "delta_size"):
        whole = (9 * getattr(parts[0], name) + 21 * getattr(parts[1], name)) / 30
        torch.testing.assert_close(getattr(packed, name), whole, rtol=1e-9, atol=1e-13)


def test_sink_mass_and_anisotropy() -> None:
    q, k, v, _ = draw()
    found = ALL_ROWS(q, k, v)
    p = torch.softmax(
        q.double().transpose(1, 2) @ k.double().transpose(1, 2).repeat_interleave(2, 1).mT / 4, -1
    )  # fmt: skip
    torch.testing.assert_close(found.sink_mass, p[..., 0].mean((0, 2)))
    flat = v.double().transpose(0, 2).flatten(1, 2)
    lean = (flat.mean(1).abs() / flat.std(1, correction=0)).amax(-1)
    torch.testing.assert_close(found.v_anisotropy, lean.repeat_interleave(2))
    assert found.eps_bias is None
    with pytest.raises(InputError, match="give d_out"):
        found.relative_eps()


def test_a_log_sum_exp_that_is_off_leaks_although_the_output_is_right() -> None:
    q, k, v, d_out = draw()
    true, lse = (t.double() for t in ops.attention(*(t.double() for t in (q, k, v)), return_lse=True, backend="reference"))
    off = lse + 1e-3
    found = ALL_ROWS(q.double(), k.double(), v.double(), out=true, lse=off, d_out=d_out.double())
    delta = (d_out.double() * true).sum(-1)
    # P is too small by a factor f: rowsum(P (dP - delta)) = f delta - f delta = 0, where delta comes from the true output
    torch.testing.assert_close(found.shift_leak, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    bent = ALL_ROWS(q.double(), k.double(), v.double(), out=1.01 * true, lse=off, d_out=d_out.double())
    expected = torch.exp(torch.tensor(-1e-3, dtype=torch.float64)) * -0.01 * delta.mean((0, 1)) / delta.abs().mean((0, 1))
    torch.testing.assert_close(bent.shift_leak, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("stable", "share"), [("dynamic_max", 1.0), ("delta", 0.02), ("exact_delta", 0.0)])
def test_stable_modes_say_how_delta_is_formed(stable: str, share: float) -> None:
    q, k, v, d_out = draw()
    plain, found = (ALL_ROWS(q, k, v, d_out=d_out, stable=mode).relative_eps().abs().max() for mode in ("off", stable))
    assert found <= share * plain
    assert (found > 0) == (share > 0)


def test_it_measures_what_the_emulator_does() -> None:
    """Coarse outputs: row sums of the gradients of scores, through a key that does not matter, are minus eps."""
    fmt = custom(5)
    q, k, v, d_out = (round_to(t.double(), fmt) for t in draw(kv=4))
    policy = SitePolicy("coarse", SitePolicy.preset("kernel", fmt).only(["O_out"]).sites)
    # a channel of q that is 1, against a channel of k that is 1 for every key: its gradient is the sum over the row
    q, k = (torch.cat([t[..., :-1], torch.ones_like(t[..., :1])], -1) for t in (q, k))
    q.requires_grad_()
    out = emulated_attention(q, k, v, policy=policy, algorithm="fa2")
    (grad,) = torch.autograd.grad(out, q, d_out)
    found = RoundingBiasProbe(rows=1000, fmt=fmt)(q, k, v, out=out.detach(), d_out=d_out)
    assert found.shift_leak is not None
    assert found.delta_size is not None
    torch.testing.assert_close(found.shift_leak * found.delta_size, grad[..., -1].mean((0, 1)) * 4, rtol=1e-6, atol=1e-12)


def test_rows_are_the_same_each_time_and_spread_over_sequences() -> None:
    q, k, v, _ = draw(batch=6)
    probe = RoundingBiasProbe(rows=16)
    first, second = (look_at(probe.take(prepare(q, k, v))) for _ in range(2))
    assert torch.equal(first.rows, second.rows)
    assert first.rows.shape == (2, 8)
    assert len(set(first.sequences.tolist())) == 2
    assert probe(q, k, v).rows == 16


def test_refusals() -> None:
    q, k, v, d_out = draw()
    with pytest.raises(OptionError, match="rows=0"):
        RoundingBiasProbe(rows=0)
    with pytest.raises(ShapeError, match="out has shape"):
        ALL_ROWS(q, k, v, out=q[:, 1:])
    with pytest.raises(ShapeError, match="no row"):
        ALL_ROWS(q[:, :0], k, v)
    with pytest.raises(UnsupportedError, match="head width"):
        ALL_ROWS(q[..., :8], k[..., :8], v)
    with pytest.raises(OptionError, match="stable="):
        ALL_ROWS(q, k, v, stable="stochastic")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("d_out", d_out)):
        broken = {"q": q, "k": k, "v": v, "d_out": d_out} | {name: torch.full_like(tensor, torch.nan)}
        with pytest.raises(InputError, match=f"{name} holds NaN"):
            ALL_ROWS(**broken)


@pytest.mark.parametrize(
    "option", [{"softcap": 5.0}, {"sinks": torch.zeros(4)}, {"q_pos": torch.arange(24)}], ids=lambda option: next(iter(option))
)
def test_calls_that_a_probe_does_not_know_are_refused(option: dict[str, Any]) -> None:
    q, k, v, _ = draw()
    with pytest.raises(UnsupportedError, match="a probe knows no softcap"):
        ALL_ROWS.take(prepare(q, k, v, causal=True, **option))
