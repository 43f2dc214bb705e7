"""Hashes, maskers and the sparse mixer against formulas written out here."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnkit._core.errors import OptionError, UnsupportedError
from attnkit.modules import (
    Kept,
    LearnedDrop,
    LSHHasher,
    MixerContext,
    RandomDrop,
    Redrawn,
    RotaryEmbedding,
    SoftmaxAttention,
    SparseCausalAttention,
    TopKDrop,
)
from attnkit.modules.selection import uniform

WIDTH, HEADS, D = 64, 4, 16


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_draw() -> None:
    index, draws = torch.arange(200_000), torch.tensor(3)
    x = uniform(1, draws, index)
    assert x.min() > 0
    assert x.max() < 1
    assert abs(float(x.mean()) - 0.5) < 0.004
    assert torch.equal(x, uniform(1, draws, index))
    assert (torch.histc(x, 50, 0, 1) - 4000).abs().max() < 330  # five standard deviations
    for other in (uniform(2, draws, index), uniform(1, draws + 1, index), uniform(1, draws, index + 1)):
        assert abs(float(torch.corrcoef(torch.stack([x, other]))[0, 1])) < 0.012
    assert abs(float(torch.corrcoef(torch.stack([x[::2], x[1::2]]))[0, 1])) < 0.016


def test_hashes() -> None:
    hasher = LSHHasher(2, D, 8, seed=5)
    rotations = hasher.rotations()
    assert rotations.shape == (1, 2, D, 4)
    torch.testing.assert_close(rotations.norm(dim=2), torch.ones(1, 2, 4))
    x = torch.randn(3, 50, 4, D)
    bucket = hasher(x)
    assert bucket.dtype == torch.int32
    assert bucket.shape == (3, 50, 4)
    expected = torch.stack(
        [torch.cat([x[:, :, h] @ rotations[0, h // 2], -x[:, :, h] @ rotations[0, h // 2]], -1).argmax(-1) for h in range(4)],
        -1,
    )  # heads 0 and 1 share rotations, as 2 and 3 do
    assert torch.equal(bucket.long(), expected)
    assert torch.equal(hasher(-x), (bucket + 4) % 8)
    assert torch.equal(hasher(7 * x), bucket)
    assert not torch.equal(LSHHasher(2, D, 8, seed=6)(x), bucket)
    near = (hasher(x + 0.1 * torch.randn_like(x)) == bucket).float().mean()
    assert near > 0.8 > 0.3 > (hasher(torch.randn_like(x)) == bucket).float().mean()
    assert LSHHasher(2, D, 8, rounds=3)(x).shape == (3, 3, 50, 4)
    shared = LSHHasher(4, D, 8, per_head=False)
    assert torch.equal(shared(x[:, :, :1].expand(-1, -1, 4, -1))[..., 0], shared(x)[..., 0])


@pytest.mark.parametrize("make", [lambda **o: LSHHasher(2, D, 8, **o), lambda **o: RandomDrop(0.5, **o)])
def test_draws_belong_to_the_module(make: Any) -> None:
    """Not to the global generator, nor to how often forward ran; and they are saved."""

    def choices(part: Redrawn) -> Tensor:
        found = part(x)
        return found.keep if isinstance(found, Kept) else found

    x = torch.randn(1, 300, 2, D)
    part = make(seed=3)
    state = torch.random.get_rng_state()
    first = choices(part)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(choices(part), first)
    part.advance("epoch")
    assert torch.equal(choices(part), first)
    part.advance()
    second = choices(part)
    assert not torch.equal(second, first)
    fresh = make(seed=3)
    fresh.load_state_dict(part.state_dict())
    assert torch.equal(choices(fresh), second)
    never = make(seed=3, resample="never")
    never.advance()
    assert torch.equal(choices(never), first)
    with pytest.raises(OptionError, match="resample='batch'"):
        make(resample="batch")


def test_random_drop() -> None:
    drop, x = RandomDrop(0.3, seed=1), torch.zeros(2, 4000, 3, D)
    keep = drop(x).keep
    assert abs(float(keep.float().mean()) - 0.7) < 0.012
    assert not torch.equal(keep[0], keep[1])
    assert not torch.equal(keep[..., 0], keep[..., 1])
    drop.eval()
    keep = drop(x).keep
    assert torch.equal(keep[0], keep[1])  # in evaluation a batch does not matter, nor does it matter where a call begins
    assert torch.equal(drop(x[:, 100:], 100).keep, keep[:, 100:])
    assert RandomDrop(0.0)(x).keep.all()


def test_learned_drop() -> None:
    drop, x = LearnedDrop(2, D, penalty=0.7), torch.randn(3, 11, 2, D)
    keep, gate = drop(x)
    assert gate is not None
    assert keep.all()  # new gates are open
    with torch.no_grad():
        drop.weight.normal_()
        drop.bias.zero_()
    keep, gate = drop(x)
    expected = torch.sigmoid((x * drop.weight).sum(-1) + drop.bias)
    assert gate is not None
    torch.testing.assert_close(gate, expected)
    assert torch.equal(keep, expected > 0.5)
    coefficients = torch.randn_like(gate)
    ours = torch.autograd.grad((gate * coefficients).sum(), tuple(drop.parameters()))
    plain = torch.autograd.grad((expected * coefficients).sum() + 0.7 * expected.mean(), tuple(drop.parameters()))
    torch.testing.assert_close(ours, plain)


def test_top_k_drop() -> None:
    drop, x = TopKDrop(2, D, share=0.25), torch.randn(3, 40, 2, D)
    keep = drop(x).keep
    assert (keep.sum(1) == 10).all()
    score = (x * drop.weight).sum(-1)
    assert (score.masked_fill(~keep, math.inf).amin(1) >= score.masked_fill(keep, -math.inf).amax(1)).all()
    assert TopKDrop(2, D, share=0.01)(x).keep.sum() == 6


def written_out(layer: SparseCausalAttention, x: Tensor, seen: Tensor, theta: float | None) -> Tensor:
    """The mixer on one row [T, C] with a mask [H, T, T], in float64; rows that see nothing give 0."""
    parts = {name: getattr(layer, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj") if hasattr(layer, name)}
    q, v = (F.linear(x.double(), parts[name].weight.double()).unflatten(-1, (-1, D)) for name in ("q_proj", "v_proj"))
    if layer.temperature is not None:
        k = q / q.norm(dim=-1, keepdim=True)
        q = q * layer.temperature.double()[:, None]
    else:
        k = F.linear(x.double(), layer.k_proj.weight.double()).unflatten(-1, (-1, D))
    if theta:
        half = D // 2
        angle = torch.arange(len(x)).double()[:, None, None] * theta ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.complex(t[..., :half], t[..., half:]) * turn for t in (q, k))
        q, k = (torch.cat([t.real, t.imag], -1) for t in (q, k))
    k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(D)
    prob = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return F.linear(torch.einsum("hij,jhd->ihd", prob, v).flatten(1), parts["o_proj"].weight.double())


def _context(rows: int, **options: Any) -> MixerContext:
    return MixerContext(rope=RotaryEmbedding(D, theta=50.0)(torch.arange(rows)[None]), **options)


@pytest.mark.parametrize("self_attend", [True, False])
@pytest.mark.parametrize(("qk_shared", "kv_heads"), [(True, 4), (False, 2)])
def test_hash_mode(qk_shared: bool, kv_heads: int, self_attend: bool) -> None:
    layer = SparseCausalAttention(
        WIDTH, HEADS, num_kv_heads=kv_heads, qk_shared=qk_shared, num_buckets=4, self_attend=self_attend, seed=2
    )
    x = 3 * torch.randn(1, 30, WIDTH)
    q = layer.q_proj(x).unflatten(-1, (-1, D))
    k = q if qk_shared else layer.k_proj(x).unflatten(-1, (-1, D))
    mine, theirs = (layer.hasher(t)[0].T.repeat_interleave(HEADS // t.shape[2], 0) for t in (q, k))  # of unrotated vectors
    order = torch.ones(30, 30, dtype=torch.bool).tril(0 if self_attend else -1)
    seen = (mine[:, :, None] == theirs[:, None]) & order
    found = layer(x, _context(30))
    torch.testing.assert_close(found[0].double(), written_out(layer, x[0], seen, 50.0), rtol=1e-4, atol=1e-5)


def test_drop_mode_with_learned_gates() -> None:
    layer = SparseCausalAttention(
        WIDTH, HEADS, num_kv_heads=2, mode="drop", rope=False, drop_q=LearnedDrop(HEADS, D), drop_k=LearnedDrop(2, D)
    )
    with torch.no_grad():
        for gate in (layer.drop_q, layer.drop_k):
            gate.weight.normal_()
            gate.bias.zero_()
    x = torch.randn(1, 25, WIDTH)
    q, k = (t(x).unflatten(-1, (-1, D)) for t in (layer.q_proj, layer.k_proj))
    (keep_q, weight_q), (keep_k, weight_k) = layer.drop_q(q), layer.drop_k(k)
    assert 0.2 < keep_q.float().mean() < 0.8
    seen = keep_q[0].T[:, :, None] & keep_k[0].T.repeat_interleave(2, 0)[:, None] & torch.ones(25, 25).tril().bool()
    plain = SparseCausalAttention(WIDTH, HEADS, num_kv_heads=2, mode="dense", rope=False)
    plain.load_state_dict(layer.state_dict(), strict=False)
    value = layer.v_proj(x).unflatten(-1, (-1, D)) * weight_k[..., None]
    scores = torch.einsum("ihd,jhd->hij", q[0], k[0].repeat_interleave(2, 1)) / math.sqrt(D)
    prob = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    out = torch.einsum("hij,jhd->ihd", prob, value[0].repeat_interleave(2, 1)) * weight_q[0][..., None]
    torch.testing.assert_close(layer(x)[0], layer.o_proj(out.flatten(1)), rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in layer.parameters())


def test_dense_mode_is_softmax_attention() -> None:
    sparse = SparseCausalAttention(WIDTH, HEADS, num_kv_heads=2, mode="dense")
    dense = SoftmaxAttention(WIDTH, HEADS, num_kv_heads=2)
    dense.load_state_dict(sparse.state_dict())
    x = torch.randn(2, 40, WIDTH)
    torch.testing.assert_close(sparse(x, _context(40)), dense(x, _context(40)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["hash", "drop"])
def test_running_forward_again_chooses_the_same(mode: str) -> None:
    """Gradient checkpointing does; with draws inside forward its gradients would belong to other buckets."""
    layer = SparseCausalAttention(WIDTH, HEADS, mode=mode, num_buckets=4, rope=False)
    x = torch.randn(2, 40, WIDTH)
    grads = []
    for run in (layer, lambda t: checkpoint(layer, t, use_reentrant=False)):
        loss = run(x).square().sum()
        grads.append(torch.autograd.grad(loss, tuple(layer.parameters())))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["hash", "drop"])
def test_boundaries_and_padding_meet(mode: str) -> None:
    """Packed rows behind the last boundary, and padding with drops: nobody meets across."""
    layer = SparseCausalAttention(WIDTH, HEADS, mode=mode, num_buckets=4, rope=False).eval()
    x = torch.randn(1, 20, WIDTH)
    packed = layer(x, MixerContext(cu_seqlens=torch.tensor([0, 7, 16]).int(), max_seqlen=9))
    changed = x.clone()
    changed[:, 7:16] = torch.randn(1, 9, WIDTH)
    again = layer(changed, MixerContext(cu_seqlens=torch.tensor([0, 7, 16]).int(), max_seqlen=9))
    assert torch.equal(packed[:, :7], again[:, :7])
    assert torch.equal(packed[:, 16:], again[:, 16:])
    if mode == "hash":
        torch.testing.assert_close(packed[:, 7:16], layer(x[:, 7:16]), rtol=1e-4, atol=1e-5)
    padding = torch.ones(1, 20, dtype=torch.bool)
    padding[:, 12:] = False
    torch.testing.assert_close(
        layer(x, MixerContext(padding=padding))[:, :12], layer(x[:, :12]), rtol=1e-4, atol=1e-5
    )  # the same places


def test_compiles_without_a_break() -> None:
    for mode in ("hash", "drop"):
        layer = SparseCausalAttention(WIDTH, HEADS, mode=mode, num_buckets=4, rope=False)
        x = torch.randn(1, 20, WIDTH)
        compiled: nn.Module = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


def test_refusals() -> None:
    with pytest.raises(OptionError, match="mode='sparse'"):
        SparseCausalAttention(WIDTH, HEADS, mode="sparse")
    with pytest.raises(OptionError, match="they are 2 and 4"):
        SparseCausalAttention(WIDTH, HEADS, num_kv_heads=2, qk_shared=True)
    with pytest.raises(OptionError, match="num_buckets=7"):
        SparseCausalAttention(WIDTH, HEADS, num_buckets=7)
    with pytest.raises(OptionError, match="above 256"):
        SparseCausalAttention(WIDTH, HEADS, num_buckets=258)
    for wrong in ({"rate": 1.0}, {"rate": -0.1}):
        with pytest.raises(OptionError, match="rate"):
            RandomDrop(**wrong)
    with pytest.raises(OptionError, match="share"):
        TopKDrop(2, D, share=0.0)
    with pytest.raises(OptionError, match="threshold"):
        LearnedDrop(2, D, threshold=1.0)
    layer = SparseCausalAttention(WIDTH, HEADS, rope=False)
    with pytest.raises(UnsupportedError, match="both sides"):
        layer(torch.randn(1, 3, WIDTH), MixerContext(causal=False))
    with pytest.raises(OptionError, match=r"context\.rope is missing"):
        SparseCausalAttention(WIDTH, HEADS)(torch.randn(1, 3, WIDTH))
    chosen = SparseCausalAttention(WIDTH, HEADS, rope=False, mode="drop", drop_q=TopKDrop(HEADS, D))
    with pytest.raises(UnsupportedError, match="TopKDrop looks at the whole sequence"):
        chosen(torch.randn(1, 3, WIDTH), MixerContext(cache=object()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [{"mode": "hash", "num_buckets": 4}, {"mode": "drop"}, {"mode": "dense"}])
@pytest.mark.parametrize("qk_shared", [True, False])
def test_autocast(device: str, options: dict[str, Any], qk_shared: bool) -> None:
    """What autocast computes in float32 (norms, on a GPU) meets queries in bfloat16."""
    layer = SparseCausalAttention(WIDTH, HEADS, rope=False, qk_shared=qk_shared, **options).to(device)
    with torch.autocast(device, torch.bfloat16):
        out = layer(torch.randn(2, 33, WIDTH, device=device))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in layer.parameters())
