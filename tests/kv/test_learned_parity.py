"""Patterns, gates and budgets that kvpress has too, on the same tensors."""

import sys
from dataclasses import replace

import pytest
import torch
from contexts import Attention, context, rows
from kvpress_peer import peer, peer_kwargs
from safetensors.torch import save_file

from attnkit.kv import press
from attnkit.kv.budgets import each
from attnkit.kv.line import MUST_STAY
from attnkit.kv.scorers.patterns import LazyLayers, _of_prompt

SIZE = 60


def layer(**options):
    """A layer whose attention is not called "eager", which some of theirs refuse."""
    made = Attention(**options)
    made.module.config._attn_implementation = "sdpa"
    return made


def theirs_keep(their, ctx):
    """[B, Hkv, S] bool: what stays after their `compress`, by the keys that they mask."""
    ctx.module.masked_key_indices = None
    keys, values = ctx.stored.keys.clone(), ctx.stored.values.clone()
    with torch.no_grad():
        their.compress(ctx.module, ctx.hidden, keys, values, None, peer_kwargs(ctx.module, keys.shape[2]))
    kept = torch.ones(ctx.stored.shape, dtype=torch.bool)
    if ctx.module.masked_key_indices is not None:
        kept[tuple(ctx.module.masked_key_indices)] = False
    return kept


def ours_keep(made, ctx):
    ctx = replace(ctx, ratio=made.ratio)
    scores = made.scorer.score(ctx)
    counts = made.budget.counts(ctx, scores, made.schedule.kept(ctx.stored.length, made.ratio, ctx.seen))
    return made.selector.select(ctx, scores, counts, made.scorer).mask(ctx.stored.shape[2])


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("first", [0.0, 0.5, 1.0])
def test_criticalkv_keeps_what_theirs_keeps(ratio, first):
    kvpress = peer()
    ctx = context(rows(SIZE, SIZE), layer())
    their = kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio, window_size=5), first_stage_ratio=first)
    kwargs = peer_kwargs(ctx.module, SIZE)
    with torch.no_grad():
        scores = their.score(ctx.module, ctx.hidden, ctx.stored.keys, ctx.stored.values, None, kwargs)
    kept = torch.zeros(ctx.stored.shape, dtype=torch.bool)
    kept.scatter_(-1, scores.topk(max(1, int(SIZE * (1 - ratio)))).indices, True)
    ours = ours_keep(press("criticalkv:snapkv", window=5, ratio=ratio, first=first), ctx)
    assert torch.equal(ours, kept)
    plain = ours_keep(press("snapkv", window=5, ratio=ratio), ctx)
    assert torch.equal(plain, kept) == (first == 1.0)


def test_criticalkv_lets_the_base_score_choose_at_least_one():
    kvpress = peer()
    ctx = replace(context(rows(SIZE), layer(), queries=1), ratio=0.95)
    their = kvpress.CriticalKVPress(kvpress.KnormPress(0.95), first_stage_ratio=0.1)
    with torch.no_grad():
        scores = their.score(ctx.module, ctx.hidden, ctx.stored.keys, ctx.stored.values, None, peer_kwargs(ctx.module, SIZE))
    kept = torch.zeros(ctx.stored.shape, dtype=torch.bool).scatter_(-1, scores.topk(3).indices, True)
    assert torch.equal(ours_keep(press("criticalkv:knorm", ratio=0.95, first=0.1), ctx), kept)
    assert not torch.equal(ours_keep(press("criticalkv:knorm", ratio=0.95, first=0.0), ctx), kept)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_critical_adakv_keeps_what_theirs_keeps(ratio):
    kvpress = peer()
    ctx = context(rows(SIZE), layer())
    kept = theirs_keep(kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio, window_size=5)), ctx)
    ours = ours_keep(press("critical_adakv:snapkv", window=5, ratio=ratio), ctx)
    assert torch.equal(ours, kept)
    assert len(set(ours.sum(-1).flatten().tolist())) > 1


@pytest.mark.parametrize("ratio", [0.03, 0.5, 0.77, 0.98])
def test_lukv_keeps_what_theirs_keeps(ratio, tmp_path):
    kvpress = peer()
    generator = torch.Generator().manual_seed(3)
    grid = torch.arange(1, 100).div(100)[:, None, None]
    curves = (grid + 0.3 * (torch.rand(99, 3, 4, generator=generator) - 0.5)).clamp(0, 1)
    save_file({"lukv": curves}, tmp_path / "curves.safetensors")
    ctx = context(rows(SIZE), layer(kv_heads=4))
    their = kvpress.LUKVPress(kvpress.KeyDiffPress(), compression_ratio=ratio)
    their._budget_curves = curves.numpy()
    kept = theirs_keep(their, ctx)
    ours = ours_keep(press("lukv:keydiff", ratio=ratio, curves=str(tmp_path / "curves.safetensors")), ctx)
    assert torch.equal(ours.sum(-1), kept.sum(-1))
    roomy = kept.sum(-1) >= 5  # where not even those that must stay can, the choice is free
    assert torch.equal(ours[roomy], kept[roomy])
    assert bool(roomy.any())


@pytest.mark.parametrize("recent", [5, 20])
def test_simlayerkv_measures_what_theirs_measures_besides_a_tokens_own_key(recent):
    kvpress = peer()
    ctx = context(rows(SIZE), layer())
    seen = []
    their = kvpress.SimLayerKVPress(n_recent=recent, n_initial=3)
    compute = kvpress.SnapKVPress.compute_window_attention
    with torch.no_grad():
        weights = compute(ctx.module, ctx.hidden, ctx.stored.keys, 1, peer_kwargs(ctx.module, SIZE)["position_embeddings"])
    mean = weights.mean((0, 1, 2))
    share = float(mean[: their.n_initial].sum() + mean[-their.n_recent :].sum())
    own = float(ctx.attention(1)[..., -1].mean())
    scores = torch.zeros(ctx.stored.shape)
    for offset in (-1e-5, 1e-5):  # theirs leaves the query's own key out, ours counts it among the newest
        budget = LazyLayers(share + own + offset, 3, recent + 1, 1)
        seen.append(budget.counts(ctx, scores, SIZE).tolist())
    assert seen == [[[recent + 4] * 2], [[SIZE] * 2]]
    assert their.is_lazy(ctx.module, ctx.hidden, ctx.stored.keys, peer_kwargs(ctx.module, SIZE)["position_embeddings"]) is False


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_duo_attention_streams_the_heads_that_theirs_streams(ratio, tmp_path):
    kvpress = peer()
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(5))
    (tmp_path / "pattern.tsv").write_text("\n".join("\t".join(f"{x:.6f}" for x in row) for row in scores.tolist()))
    for index in range(3):
        ctx = context(rows(SIZE), layer(kv_heads=4, index=index))
        their = kvpress.DuoAttentionPress(head_compression_ratio=ratio)
        their.load_attention_pattern = lambda model: (4, 10, scores.numpy())
        their.post_init_from_model(ctx.module.q_proj.weight)  # it asks for a device
        kept = theirs_keep(their, ctx)
        made = press("duo_attention", ratio=ratio, pattern=str(tmp_path / "pattern.tsv"), sink=4, recent=10)
        assert torch.equal(ours_keep(made, ctx), kept)


@pytest.mark.parametrize("threshold", [-2.5, -1.5])
def test_dms_keeps_what_theirs_keeps(threshold):
    kvpress = peer()
    ctx = context(rows(SIZE, SIZE), layer(), queries=1)
    their = kvpress.DMSPress(kvpress.KnormPress(), threshold=threshold, sliding_window_size=9)
    cache = type("Cache", (), {"layers": [None, type("Layer", (), {"keys": ctx.stored.keys, "values": ctx.stored.values})()]})()
    kwargs = peer_kwargs(ctx.module, SIZE) | {"hidden_states": ctx.hidden, "past_key_values": cache}
    ctx.module.masked_key_indices = None
    their.forward_hook(ctx.module, [], kwargs, [None, None])
    kept = torch.ones(ctx.stored.shape, dtype=torch.bool)
    kept[tuple(ctx.module.masked_key_indices)] = False
    assert torch.equal(ours_keep(press("dms:knorm", threshold=threshold, sliding_window=9), ctx), kept)
    assert 0.1 < kept.float().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finch_scores_are_theirs(dtype):
    kvpress = peer()
    made = layer()
    made.module.to(dtype)
    ctx = context(rows(SIZE, SIZE, dtype=dtype), made)
    their = kvpress.FinchPress()
    their.window_size = 11
    with torch.no_grad():
        kwargs = peer_kwargs(ctx.module, SIZE, dtype)
        expected = their.score(ctx.module, ctx.hidden, ctx.stored.keys, ctx.stored.values, None, kwargs).float()
    ours = press("finch", window=11).scorer.score(ctx)
    assert bool((ours[..., -11:] >= MUST_STAY).all())
    close = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(ours[..., :-11], expected[..., :-11], **close)


@pytest.mark.parametrize("deep", [False, True])
def test_kvzap_scores_are_theirs(deep, tmp_path):
    kvpress = peer()
    module = sys.modules["kvpress.presses.kvzap_press"]
    ctx = context(rows(SIZE, SIZE), layer())
    torch.manual_seed(0)
    config = module.KVzapConfig(input_dim=ctx.hidden.shape[-1], output_dim=2, n_modules=3, hidden_dim=16 if deep else None)
    their = kvpress.KVzapPress(model_type="mlp" if deep else "linear")
    their.kvzap_model = module.KVzapModel(config)
    save_file(their.kvzap_model.state_dict(), tmp_path / "w.safetensors")
    with torch.no_grad():
        expected = their.score(ctx.module, ctx.hidden, ctx.stored.keys, ctx.stored.values, None, {})
    ours = press("kvzap", weights=str(tmp_path / "w.safetensors")).scorer.score(ctx)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_fastkvzip_gates_are_theirs(tmp_path):
    kvpress = peer()
    module = sys.modules["kvpress.presses.fastkvzip_press"]
    ctx = context(rows(200), layer())
    torch.manual_seed(0)
    gates = [module.FastKVzipGate(index, ctx.hidden.shape[-1], 2, 2, torch.float32) for index in range(3)]
    with torch.no_grad():
        for gate in gates:
            for parameter in gate.parameters():
                parameter.normal_()
    state = {f"layers.{index}.{name}": value for index, gate in enumerate(gates) for name, value in gate.state_dict().items()}
    save_file(state, tmp_path / "gates.safetensors")
    their = kvpress.FastKVzipPress()
    their.gates, their.score_val = gates, [None] * 3
    with torch.no_grad():
        their._score_fast(ctx.module, ctx.hidden)
    expected = their.score_val[1]
    ours = press("fastkvzip", weights=str(tmp_path / "gates.safetensors")).scorer.score(ctx)
    forced = ours >= MUST_STAY
    assert forced.sum() == 2 * (4 + 4)  # the first four and a fiftieth
    assert bool((expected[forced] == 1).all())
    torch.testing.assert_close(ours[~forced], expected[~forced], rtol=1e-5, atol=1e-6)


def test_lukv_rounds_each_row_by_its_own_length(tmp_path):
    curves = torch.full((99, 3, 4), 0.5)
    curves[:, :, 0] = 0.21
    save_file({"lukv": curves}, tmp_path / "curves.safetensors")
    ctx = context(rows(60, 33), layer(kv_heads=4))
    made = press("lukv:knorm", curves=str(tmp_path / "curves.safetensors"))
    counts = made.budget.counts(replace(ctx, ratio=0.5), torch.zeros(ctx.stored.shape), each(30, torch.zeros(ctx.stored.shape)))
    assert counts.tolist() == [[47, 30, 30, 30], [26, 17, 17, 16]]  # 47.4 + 90 = 137, 26.07 + 49.5 = 76


def test_what_a_prompt_says_of_its_heads_is_the_same_behind_padding():
    together = _of_prompt(context(rows(60, 33), pad=3))
    alone = [_of_prompt(context(rows(60, 33)[place : place + 1]))[0] for place in range(2)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3
